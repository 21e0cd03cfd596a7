"""Layers, names, releases: what a name means, that released files stay as they are and nothing is half-written."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from coeffs_samples import sample_entry

import coeffs
from coeffs import release, store
from coeffs.errors import AmbiguousEntry, EntryError, EntryNotFound, PublishError

ROOT = Path(coeffs.__file__).parent.parent


@pytest.fixture(autouse=True)
def no_registry_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv(store.ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "data"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")


@pytest.fixture
def registry(tmp_path):
    folder = tmp_path / "registry"
    folder.mkdir()
    return folder


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_name_means_its_newest_version_and_can_be_pinned(registry):
    first = coeffs.publish(sample_entry(), registry)
    second = coeffs.publish(sample_entry(notes="measured again"), registry)
    assert [path.relative_to(registry).as_posix() for path in (first, second)] == [
        "longcat-image/v1.yaml",
        "longcat-image/v2.yaml",
    ]
    assert coeffs.load("longcat-image", registry).notes == "measured again"
    assert coeffs.load("LongCat-Image@v1", registry) == replace(sample_entry(), version=1)
    with pytest.raises(
        EntryNotFound, match="longcat-image has no version 7: expected one of v1, v2"
    ):
        coeffs.load("longcat-image@v7", registry)


def test_a_short_name_without_a_measured_entry_names_the_published_candidates():
    with pytest.raises(AmbiguousEntry) as caught:
        coeffs.load("longcat-image")
    for candidate in ("vllm-omni/longcat-image", "sglang/longcat-image-pr36767"):
        assert candidate in str(caught.value)


def test_a_short_name_that_only_a_copied_set_answers_to_is_refused():
    with pytest.raises(
        AmbiguousEntry, match="alivilab/consisid@v1, was copied from alivilab/cogvideox-5b"
    ):
        coeffs.load("consisid")
    assert coeffs.load("alivilab/consisid").status == "copied"


def test_a_short_name_with_a_single_published_set_is_that_set():
    assert coeffs.load("mochi-1").label == "alivilab/mochi-1@v1"
    assert coeffs.load("mochi-1@v1").label == "alivilab/mochi-1@v1"


def test_a_measured_entry_under_an_owner_answers_to_its_short_name(registry):
    coeffs.publish(sample_entry(model="meituan-longcat/longcat-image"), registry)
    assert coeffs.load("longcat-image", registry).label == "meituan-longcat/longcat-image@v1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mochi-2", "did you mean alivilab/mochi-1"),
        ("nothing like it", "is no entry name"),
        ("qqqqqqqq", "see `calibrate list`"),
        ("missing.yaml", "missing.yaml: No such file or directory; expected an entry file"),
        ("./nowhere", "nowhere: No such file"),
        ("../../nowhere/passwd", "No such file"),
        ("vllm-omni/..", "no entry"),
        ("", "is no entry name"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(EntryNotFound) as caught:
        coeffs.load(name)
    assert message in str(caught.value)


def test_files_and_run_folders_are_loaded_by_path(tmp_path):
    path = coeffs.save(sample_entry(), tmp_path / "run" / "entry.yaml")
    assert (
        coeffs.load(path)
        == coeffs.load(str(path))
        == coeffs.load(path.parent)
        == sample_entry()
    )
    with pytest.raises(EntryNotFound):
        coeffs.load(tmp_path)


# --- layers ---------------------------------------------------------------------------------------------------------


def test_layers_are_asked_in_order(tmp_path, monkeypatch):
    named, environment, user = (
        tmp_path / name for name in ("named", "environment", "data/teacal/registry")
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, text in ((user, "user"), (environment, "environment"), (named, "named")):
        coeffs.save(
            sample_entry(model="mine", version=1, notes=text), folder / "mine" / "v1.yaml"
        )
    assert coeffs.load("mine").notes == "user"
    monkeypatch.setenv(store.ENVIRONMENT, os.pathsep.join([str(environment), str(empty)]))
    assert coeffs.load("mine").notes == "environment"
    assert coeffs.load("mine", named).notes == "named"
    assert [layer.name for layer in store.layers(named)] == [
        "--registry",
        store.ENVIRONMENT,
        store.ENVIRONMENT,
        "user",
        "shipped",
    ]
    assert sum(entry.model == "mine" for entry in coeffs.entries(named)) == 1


def test_an_earlier_layer_hides_the_versions_of_a_later_one_but_not_a_pinned_one(
    tmp_path, monkeypatch
):
    near, far = tmp_path / "near", tmp_path / "far"
    coeffs.save(sample_entry(model="mine", version=1), near / "mine" / "v1.yaml")
    coeffs.save(sample_entry(model="mine", version=5), far / "mine" / "v5.yaml")
    monkeypatch.setenv(store.ENVIRONMENT, str(far))
    assert coeffs.load("mine", near).version == 1
    assert coeffs.load("mine@v5", near).version == 5


def test_a_registry_that_is_no_folder_is_said(tmp_path, monkeypatch):
    with pytest.raises(EntryNotFound, match=r"from --registry\) is not a folder"):
        coeffs.entries(tmp_path / "none")
    monkeypatch.setenv(store.ENVIRONMENT, str(tmp_path / "none"))
    with pytest.raises(EntryNotFound, match=r"from TEACAL_REGISTRY\) is not a folder"):
        coeffs.load("mochi-1")


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ("linux", "data/teacal/registry"),
        ("darwin", "home/Library/Application Support/teacal/registry"),
        ("win32", "data/teacal/registry"),
    ],
)
def test_the_users_folder_follows_the_platform(platform, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    assert store.user_registry() == tmp_path / expected


def test_a_file_at_a_wrong_place_is_refused(registry):
    coeffs.save(sample_entry(version=2), registry / "longcat-image" / "v1.yaml")
    with pytest.raises(EntryError, match=r"longcat-image@v2 lies at longcat-image/v1.yaml"):
        coeffs.load("longcat-image", registry)
    found, broken = store.readable(registry)
    assert len(found) >= 67 and len(broken) == 1


# --- releases -------------------------------------------------------------------------------------------------------


def test_released_files_are_as_recorded():
    """Whoever changes a released file has to publish a new version instead."""
    assert release.problems() == []
    assert set(release.read_checksums(store.SHIPPED)) == {
        path.relative_to(store.SHIPPED).as_posix() for path in store.SHIPPED.rglob("v*.yaml")
    }


def test_released_files_are_written_canonically():
    for item in store.released():
        assert item.path.read_text(encoding="utf-8") == coeffs.dump(item.entry()), item.path


def test_changes_after_a_release_are_found(registry):
    path = coeffs.publish(sample_entry(), registry)
    coeffs.publish(sample_entry(notes="second"), registry)
    assert release.problems(registry) == []
    path.write_text(path.read_text().replace("psnr_db: 30.25", "psnr_db: 40.25"))
    (registry / "longcat-image" / "v2.yaml").unlink()
    coeffs.save(sample_entry(model="smuggled", version=1), registry / "smuggled" / "v1.yaml")
    problems = "\n".join(release.problems(registry))
    assert "v1.yaml: changed after its release" in problems
    assert "v2.yaml: listed in CHECKSUMS but missing" in problems
    assert "smuggled/v1.yaml: not in CHECKSUMS" in problems.replace(os.sep, "/")


def test_a_broken_checksums_file_names_the_line(registry):
    coeffs.publish(sample_entry(), registry)
    with (registry / release.CHECKSUMS).open("a") as stream:
        stream.write("not a checksum\n")
    with pytest.raises(EntryError, match=r"CHECKSUMS:2: 'not a checksum': expected"):
        release.problems(registry)


def test_the_same_entry_is_not_released_twice(registry):
    coeffs.publish(sample_entry(), registry)
    with pytest.raises(PublishError, match="longcat-image@v1 already says exactly this"):
        coeffs.publish(sample_entry(), registry)


def test_a_release_counts_the_versions_of_every_layer(registry):
    with pytest.raises(PublishError, match="alivilab/mochi-1@v1 already says exactly this"):
        coeffs.publish(coeffs.load("alivilab/mochi-1"), registry)
    path = coeffs.publish(replace(coeffs.load("alivilab/mochi-1"), notes="another"), registry)
    assert path.name == "v2.yaml"


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PublishError, match="nothing was published"):
        coeffs.publish(sample_entry(), tmp_path / "file")
    with pytest.raises(PublishError, match="nothing was changed"):
        coeffs.save(sample_entry(), tmp_path / "file" / "entry.yaml")


def test_a_release_whose_checksum_cannot_be_recorded_is_taken_back(registry, monkeypatch):
    monkeypatch.setattr(
        release,
        "write_checksums",
        lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(PublishError, match="No space left on device; nothing was published"):
        coeffs.publish(sample_entry(), registry)
    assert not list(registry.rglob("*.yaml"))


def test_releases_need_no_links(registry, monkeypatch):
    monkeypatch.setattr(
        os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported"))
    )
    coeffs.publish(sample_entry(), registry)
    assert coeffs.publish(sample_entry(notes="second"), registry).name == "v2.yaml"
    assert release.problems(registry) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = coeffs.save(sample_entry(notes="old"), tmp_path / "entry.yaml")
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(PublishError, match="No space left on device"):
        coeffs.save(sample_entry(notes="new"), path)
    assert coeffs.load(path).notes == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["entry.yaml"]


PUBLISHER = """
import sys
from pathlib import Path
import coeffs
base, root, mine = coeffs.load(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
import dataclasses
for number in range(int(sys.argv[4])):
    entry = dataclasses.replace(base, notes=f"process {mine}, number {number}")
    coeffs.publish(entry, root)
    coeffs.save(entry, root / "draft.yaml")
    assert coeffs.load(root / "draft.yaml").model == base.model
"""


@pytest.mark.slow
def test_eight_processes_publish_and_draft_at_once(registry, tmp_path):
    """Versions that collide, a lost release or a half-written draft would show: eight processes, fifty times each."""
    draft = coeffs.save(sample_entry(), tmp_path / "draft.yaml")
    processes, each = 8, 50
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                PUBLISHER,
                str(draft),
                str(registry),
                str(mine),
                str(each),
            ],
            cwd=ROOT,
        )
        for mine in range(processes)
    ]
    assert [process.wait(timeout=300) for process in running] == [0] * processes
    released = [item for item in store.released(registry) if item.model == "longcat-image"]
    assert sorted(item.version for item in released) == list(range(1, processes * each + 1))
    notes = {item.entry().notes for item in released}
    assert notes == {
        f"process {mine}, number {number}"
        for mine in range(processes)
        for number in range(each)
    }
    assert release.problems(registry) == []
    assert not list(registry.rglob("*.tmp"))


# --- cost -----------------------------------------------------------------------------------------------------------


def in_subprocess(code: str) -> str:
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import coeffs",
        "import coeffs; coeffs.entries(); coeffs.load('mochi-1')",
        "import calibrate.commands.registry",
    ],
)
def test_nothing_heavy_is_imported(code):
    heavy = ["numpy", "torch", "diffusers", "pandas", "scipy", "matplotlib", "transformers"]
    assert (
        in_subprocess(
            f"{code}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
        )
        == "[]"
    )


LIMITED = """
import resource, time
import coeffs
from coeffs.errors import EntryError
full = 256 * 1024
laughs = "l0: &l0 [lol]\\n" + "".join(f"l{n}: &l{n} [" + ", ".join([f"*l{n - 1}"] * 9) + "]\\n" for n in range(1, 60))
documents = [
    "a: [" + "1, " * (full // 3 - 3), "a: [" + "[], " * (full // 4 - 3), "- " * (full // 2), "[" * full, "{" * full,
    "{a: " * (full // 4), "? " * (full // 2), "a: " + "x" * (full - 9), "a: '" + "x" * (full - 9),
    "a: |\\n " + "x\\n " * (full // 3),
    "".join(f"k{n}: 1\\n" for n in range(full // 9)), "#" * full, "\\n" * full, " " * full, "a: " + "9" * (full - 9),
    "a: 1." + "9" * (full - 9), "a: 1.0e+" + "9" * (full - 9), '"' + "\\\\u0041" * (full // 6 - 2) + '": 1', laughs,
    "&a " * (full // 3),
    "a: {" + ", ".join(f"k{n}: [1]" for n in range(full // 12)) + "}", "\\ufeff" * (full // 3), "!" * full,
    "%" * full, "x" * 10**8,
    b"\\xff" * 10**7, "a: &x " + "[" * 1000 + "]" * 1000, "- " * 30, "a:\\n" * 20000,
]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20,) * 2)
worst = 0.0
for document in documents:
    begun = time.process_time()
    try:
        coeffs.loads(document)
    except EntryError as error:
        assert len(str(error)) < 1000, len(str(error))
    else:
        raise AssertionError("accepted")
    worst = max(worst, time.process_time() - begun)
print(worst)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="limits of address space are Linux's"
)
def test_the_worst_documents_take_neither_a_second_nor_100_mb():
    assert float(in_subprocess(LIMITED)) <= 1.0
