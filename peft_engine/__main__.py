"""`python -m peft_engine` is the command line."""

from .cli import main

main()
