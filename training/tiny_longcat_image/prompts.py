"""Write the model's captions, one per line, in their even order.

The shipped list is made by

    python -m training.tiny_longcat_image.prompts > calibrate/data/prompts/tiny-longcat-image.txt
"""

import click

from .data import evenly_ordered_captions

if __name__ == "__main__":
    for caption in evenly_ordered_captions():
        click.echo(caption.text)
