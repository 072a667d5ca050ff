"""TRL's SFTTrainer on a split model: LoRA on the ends, a loss over the completions alone. (pip install 'splitfl[trl]')

    python examples/sft.py --trunk JOIN --identity me.key --model MODEL --data pairs.jsonl

Each line of the data is {"prompt": ..., "completion": ...}.
"""

from __future__ import annotations

import argparse
import json
import tempfile

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from client_ends import SplitModelForCausalLM, bind_trainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--trunk", required=True, help="the join string")
parser.add_argument("--identity", required=True, help="your key file")
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True, help="it never leaves this machine")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--packing", action="store_true")
args = parser.parse_args()

with open(args.data, encoding="utf-8") as file:
    pairs = Dataset.from_list([json.loads(line) for line in file])
model = SplitModelForCausalLM.from_pretrained(args.model, trunk=args.trunk, identity=args.identity)

with tempfile.TemporaryDirectory() as directory:
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=directory,
            max_steps=args.steps,
            per_device_train_batch_size=1 if args.packing else 4,
            packing=args.packing,
            max_length=128,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=10,
            save_strategy="no",
            bf16=False,
        ),
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    )
    bind_trainer(trainer)
    trainer.train()
model.close()
