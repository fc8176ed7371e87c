"""The door to training; everything is in sdft_ds.train.

deepspeed launch/train.py --deepspeed ds_configs/zero2.json
"""

from sdft_ds.train import main

if __name__ == "__main__":
    main()
