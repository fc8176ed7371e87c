"""Verify a checkpoint, or convert it to DeepSpeed's universal format.

python -m sdft_ds.checkpoint verify FOLDER         say what is wrong with a checkpoint
python -m sdft_ds.checkpoint universal FOLDER      let DeepSpeed resume it on another number of ranks
"""

import argparse
import sys
from pathlib import Path

from sdft_ds.checkpoint.storage import make_universal, require_complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["verify", "universal"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        if args.what == "universal":
            make_universal(args.folder)
        else:
            require_complete(args.folder)
    except ValueError as error:
        sys.exit(f"sdft_ds: {error}")
    print(f"{args.folder} is complete.")


if __name__ == "__main__":
    main()
