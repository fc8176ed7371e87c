"""The door to training task after task; everything is in sdft_ds.sequential.

python launch/sequential.py --stage first=a.jsonl,a-test.jsonl --stage second=b.jsonl,b-test.jsonl:choice \
    -- --model_name_or_path MODEL --recipe paper
"""

from pathlib import Path

from sdft_ds.sequential import main

if __name__ == "__main__":
    main(train_script=Path(__file__).with_name("train.py"))
