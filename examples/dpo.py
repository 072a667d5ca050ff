"""TRL's DPOTrainer on a split model: the reference is the model with both sides' adapters off. (pip install 'splitfl[trl]')

    python examples/dpo.py --trunk JOIN --identity me.key --model MODEL --data preferences.jsonl

Each line of the data is {"prompt": ..., "chosen": ..., "rejected": ...}. The run trains LoRA, as it does by default.
"""

from __future__ import annotations

import argparse
import json
import tempfile

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from client_ends import SplitModelForCausalLM, bind_trainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--trunk", required=True, help="the join string")
parser.add_argument("--identity", required=True, help="your key file")
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True, help="it never leaves this machine")
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

with open(args.data, encoding="utf-8") as file:
    preferences = Dataset.from_list([json.loads(line) for line in file])
model = SplitModelForCausalLM.from_pretrained(args.model, trunk=args.trunk, identity=args.identity)

with tempfile.TemporaryDirectory() as directory:
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=directory,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            max_length=128,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=preferences,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    )
    bind_trainer(trainer)  # the loss is no mean over labels, so the trunk has to be told what it weighs
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {entry['loss']:.4f}, margin {entry['rewards/margins']:.4f}")
model.close()
