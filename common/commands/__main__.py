"""`python -m common.commands` is `resnet-parity`."""

from common.commands.main import main

main()
