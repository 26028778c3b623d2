"""``python -m resnet_fused.train``, the same as ``resnet-fused train``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
