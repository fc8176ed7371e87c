"""python -m sdft_ds.report OUTPUT_DIR [--output FILE]         writes OUTPUT_DIR/report.html"""

import argparse
import sys
from pathlib import Path

from sdft_ds.metrics import run_folder
from sdft_ds.metrics.verdict import verdict
from sdft_ds.report import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--output", type=Path, help="default: OUTPUT_DIR/report.html")
    args = parser.parse_args()
    try:
        written = write(args.output_dir, args.output)
    except (ValueError, OSError) as error:
        sys.exit(f"sdft_ds: {error}")
    for sentence in verdict(run_folder.read(args.output_dir)).sentences:
        print(sentence)
    print(f"Wrote {written}")


if __name__ == "__main__":
    main()
