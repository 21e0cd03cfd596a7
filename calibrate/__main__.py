"""``python -m calibrate``, which is also what ``torchrun -m calibrate`` starts."""

from calibrate.cli import main

main()
