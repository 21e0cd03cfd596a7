"""Whether SGLang's Cache-DiT can be switched on for the classes that we export to it: cache-dit's own adapters, asked.

Nothing of SGLang is imported: its classes are rebuilt with the block lists and the signatures that its source states.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from coeffs.engines.releases import releases

# Classes that SGLang has under a name of its own.
RENAMED = {"MiniMaxH3Transformer3DModel": "MiniMaxH3DiTModel"}


def refused_classes(root: Path) -> Iterator[str]:
    """Classes of our table that the release would crash on, with the reason."""
    generation = root / "sglang/multimodal_gen/runtime"
    classes = _classes(generation / "models/dits")
    integration = (generation / "cache/cache_dit_integration.py").read_text(encoding="utf-8")
    for name in releases()["sglang-cache-dit"].classes:
        theirs = RENAMED.get(name, name)
        if theirs not in classes:
            yield f"sglang-cache-dit: {name}: no such class"
        elif f'"{theirs}": CustomBlockAdapterSpec' not in integration:
            try:
                _adapt(theirs, classes)
            except (
                Exception
            ) as error:  # whatever cache-dit raises for a class that it cannot wrap
                yield f"sglang-cache-dit: {name}: {type(error).__name__}: {error}"


def _adapt(name: str, classes: dict[str, ast.ClassDef]) -> None:
    from cache_dit import BlockAdapter
    from cache_dit.caching.block_adapters import BlockAdapterRegister

    # cache-dit asks diffusers' own classes for more than those of other projects.
    theirs = {"__module__": "sglang.dits", "forward": lambda *_: None}
    model = type(name, (nn.Module,), theirs)()
    for attribute, block in _block_lists(classes[name], classes):
        setattr(model, attribute, nn.ModuleList([_module(block, classes)]))
    adapter = BlockAdapterRegister.get_adapter(model)
    lists, patterns = adapter.blocks, adapter.forward_pattern
    for blocks, pattern in zip(
        lists if isinstance(lists, list) else [lists],
        patterns if isinstance(patterns, list) else [patterns],
        strict=False,
    ):
        flags = {
            "check_forward_pattern": adapter.check_forward_pattern,
            "check_num_outputs": adapter.check_num_outputs,
        }
        if not BlockAdapter.match_blocks_pattern(blocks, pattern, logging=False, **flags):
            raise ValueError("the blocks take other arguments than its adapter expects")


def _classes(folder: Path) -> dict[str, ast.ClassDef]:
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in folder.glob("*.py"))
    return {
        node.name: node
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def _method(
    node: ast.ClassDef, name: str, classes: dict[str, ast.ClassDef]
) -> ast.FunctionDef | None:
    """The method as the class or its nearest base defines it."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == name:
            return part
    bases = (classes.get(ast.unparse(base)) for base in node.bases)
    found = (_method(base, name, classes) for base in bases if base is not None)
    return next((method for method in found if method is not None), None)


def _block_lists(
    node: ast.ClassDef, classes: dict[str, ast.ClassDef]
) -> Iterator[tuple[str, str | None]]:
    """Attribute and class of its blocks (None where a variable holds it) of every list of modules."""
    method = _method(node, "__init__", classes)
    assert method is not None
    for part in ast.walk(method):
        if isinstance(part, ast.Assign) and "ModuleList" in ast.unparse(part.value):
            (target,) = part.targets
            calls = (call.func for call in ast.walk(part.value) if isinstance(call, ast.Call))
            names = [call.id for call in calls if isinstance(call, ast.Name)]
            yield (
                ast.unparse(target).removeprefix("self."),
                next((name for name in names if name in classes), None),
            )


def _module(block: str | None, classes: dict[str, ast.ClassDef]) -> nn.Module:
    """A module whose forward has the signature that the source states."""
    arguments = "self, hidden_states, encoder_hidden_states"
    if block is not None:
        method = _method(classes[block], "forward", classes)
        assert method is not None
        for argument in ast.walk(method.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        arguments = ast.unparse(method.args)
    scope: dict[str, object] = {}
    exec(f"def forward({arguments}): pass", scope)
    return type("Block", (nn.Module,), {"forward": scope["forward"]})()
