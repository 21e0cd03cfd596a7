"""Write the model's captions, one per line, in their even order.

python -m training.tiny_sd3.prompts > sd3.txt
"""

import click

from training.tiny_longcat_image.data import evenly_ordered_captions

if __name__ == "__main__":
    for caption in evenly_ordered_captions():
        click.echo(caption.text)
