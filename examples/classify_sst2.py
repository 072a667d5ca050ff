"""Sentiment of SST-2 (header line, then `sentence<TAB>label`): the text, the labels and the classification head stay here.

python examples/classify_sst2.py --trunk JOIN --identity me.key --model MODEL --train train.tsv --dev dev.tsv
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from typing import Any

import numpy as np
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

from client_ends import SplitModelForSequenceClassification, bind_trainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--trunk", required=True, help="the join string")
parser.add_argument("--identity", required=True, help="your key file")
parser.add_argument("--model", required=True)
parser.add_argument("--train", required=True)
parser.add_argument("--dev", required=True)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--rows", type=int, default=0, help="use so many sentences of each file (0: all)")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token


def read(path: str) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    lines = lines[: args.rows or None]
    return [tokenizer(line["sentence"], truncation=True, max_length=64) | {"labels": int(line["label"])} for line in lines]


def accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))}


model = SplitModelForSequenceClassification.from_pretrained(args.model, trunk=args.trunk, identity=args.identity, num_labels=2)
model.config.pad_token_id = tokenizer.pad_token_id
with tempfile.TemporaryDirectory() as directory:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=directory,
            max_steps=args.steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=50,
            save_strategy="no",
        ),
        train_dataset=read(args.train),
        eval_dataset=read(args.dev),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    bind_trainer(trainer)
    trainer.train()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
model.close()
