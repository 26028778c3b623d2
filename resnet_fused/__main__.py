"""``python -m resnet_fused``, the same as ``resnet-fused``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
