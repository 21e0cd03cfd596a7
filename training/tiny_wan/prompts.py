"""Write the model's captions, one per line, in their even order.

python -m training.tiny_wan.prompts > wan.txt
"""

import click

from .data import evenly_ordered_captions

if __name__ == "__main__":
    for caption in evenly_ordered_captions():
        click.echo(caption.text)
