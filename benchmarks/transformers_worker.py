"""The transformers side of `benchmarks.fine_tuning`: predictions of a model directory, and fine-tuning by the Trainer.

    python -m benchmarks.transformers_worker answer DIRECTORY ITEMS
    python -m benchmarks.transformers_worker train SETTINGS

ITEMS is a file with {"task", "max_new_tokens", "items"}, where items are the fields of the examples. `answer` prints one JSON
object per item: label, score or text, and `margin`, the difference to the second answer in logits or nats. For a text it prints
`margins`, the logit margin of each token, and `ends`, the length of the text after each token.
SETTINGS is a file written by `benchmarks.fine_tuning`. `train` prints the seconds of the training loop. nextword is not
imported here.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

START, DELIMITER, EXTRACT = "<|start|>", "<|delimiter|>", "<|extract|>"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = 32
Item = dict[str, Any]

# ---------------------------------------------------------------- answers


def answers(
    model: Any, tokenizer: Any, task: str, max_new_tokens: int, items: Sequence[Item], with_margins: bool = True
) -> list[dict[str, Any]]:
    """The answer of a model to each item, computed as the documentation of transformers describes."""
    model.eval()
    with torch.inference_mode():
        if task in ("rewrite", "chat"):
            prompts = [encode_prompt(tokenizer, task, item, max_new_tokens) for item in items]
            return generate(model, tokenizer, prompts, max_new_tokens, with_margins)
        if task == "prefer":
            return [prefer(model, tokenizer, item) for item in items]
        sequences = [sequences_of(task, item) for item in items]
        logits = head_logits(model, tokenizer, [sequence for group in sequences for sequence in group])
    results, start = [], 0
    for group in sequences:
        rows = logits[start : start + len(group)]
        start += len(group)
        if task == "similarity" and rows.shape[1] == 1:
            results.append({"score": float(rows.sum()), "margin": 0.0})
            continue
        scores = rows[:, 0] if task == "choose" else rows.sum(0)
        best = int(scores.argmax())
        answer = best if task == "choose" else model.config.id2label[best]
        results.append({"label": answer, "margin": margin(scores)})
    return results


def margin(logits: Tensor) -> float:
    """The difference between the highest and the second highest logit."""
    first, second = logits.topk(2).values.tolist()
    return first - second


def sequences_of(task: str, item: Item) -> list[tuple[str, ...]]:
    """The sequences of an item, each of one or two texts."""
    if task == "classify":
        return [(item["text"],)]
    if task == "entail":
        return [(item["premise"], item["hypothesis"])]
    if task == "similarity":
        first, second = item["sentence1"], item["sentence2"]
        return [(first, second), (second, first)]
    return [(item["question"], choice) for choice in item["choices"]]


def head_logits(model: Any, tokenizer: Any, texts: Sequence[tuple[str, ...]]) -> Tensor:
    """Logits [N, labels] of texts or pairs, in batches of similar length."""
    encoded = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True)["input_ids"]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    rows: dict[int, Tensor] = {}
    for start in range(0, len(order), ROWS):
        indices = order[start : start + ROWS]
        batch = tokenizer.pad({"input_ids": [encoded[i] for i in indices]}, padding_side="right", return_tensors="pt")
        rows |= dict(zip(indices, model(**batch).logits.float(), strict=True))
    return torch.stack([rows[i] for i in range(len(encoded))])


def encode_prompt(tokenizer: Any, task: str, item: Item, max_new_tokens: int) -> tuple[int, ...]:
    """The prompt of an answer: a text, truncated at its end, or a conversation, truncated at its beginning."""
    max_length = tokenizer.model_max_length - max_new_tokens
    if task == "rewrite":
        return tuple(tokenizer(item["prompt"], truncation=True, max_length=max_length)["input_ids"])
    messages = item["messages"]
    prompt_messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    ids = tokenizer.apply_chat_template(prompt_messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tuple(ids[-max_length:])


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, with_margins: bool = True
) -> list[dict[str, Any]]:
    """The greedy continuation of each prompt."""
    distinct = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
    results: dict[tuple[int, ...], dict[str, Any]] = {}
    for start in range(0, len(distinct), ROWS):
        batch_prompts = distinct[start : start + ROWS]
        batch = tokenizer.pad(
            {"input_ids": [list(prompt) for prompt in batch_prompts]}, padding_side="left", return_tensors="pt"
        )
        done = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            output_scores=with_margins,
            return_dict_in_generate=True,
        )
        continuations = done.sequences[:, batch["input_ids"].shape[1] :].tolist()
        for row, (prompt, ids) in enumerate(zip(batch_prompts, continuations, strict=True)):
            ids = ids[: next((i + 1 for i, token in enumerate(ids) if token in stop_ids(model)), len(ids))]
            results[prompt] = {"text": tokenizer.decode(ids, skip_special_tokens=True)}
            if with_margins:
                texts = [tokenizer.decode(ids[: i + 1], skip_special_tokens=True) for i in range(len(ids))]
                results[prompt]["margins"] = [margin(done.scores[i][row]) for i in range(len(ids))]
                results[prompt]["ends"] = [len(text) for text in texts]
    return [results[prompt] for prompt in prompts]


def stop_ids(model: Any) -> list[int]:
    """The tokens that end a text according to the generation config."""
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [ids]


def prefer(model: Any, tokenizer: Any, item: Item) -> dict[str, Any]:
    """The answer with the higher log-probability."""
    start = tokenizer.apply_chat_template(item["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
    sums = []
    for answer in (item["chosen"], item["rejected"]):
        turn = {"role": "assistant", "content": answer}
        ids = torch.tensor([tokenizer.apply_chat_template([*item["messages"], turn], return_dict=True)["input_ids"]])
        ids = ids[:, : tokenizer.model_max_length]
        logprobs = F.log_softmax(model(ids).logits.float()[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
        sums.append(float(logprobs[len(start) - 1 :].double().sum()))
    difference = sums[0] - sums[1]
    return {"label": "chosen" if difference > 0 else "rejected", "score": difference, "margin": abs(difference)}


# ---------------------------------------------------------------- fine-tuning by the Trainer


class BothOrders(Trainer):
    """Squared error of the summed scores of the two orders of a pair; the collator stacks the orders."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, 0].view(2, -1).sum(0)
        loss = F.mse_loss(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss


class StepTimer(TrainerCallback):
    """Records the end time of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def total_seconds(self) -> float:
        """The seconds of all steps, where the first one is estimated by the mean of the others."""
        return (self.ends[-1] - self.ends[0]) * len(self.ends) / max(1, len(self.ends) - 1)


def prepare_tokenizer(base: str, task: str) -> Any:
    """The tokenizer of the base model with the special tokens and the template of the task."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(base)
    names = [START, DELIMITER] if task == "rewrite" else [START, DELIMITER, EXTRACT]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    end = DELIMITER if task == "rewrite" else EXTRACT
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A {end}",
        pair=f"{START} $A {DELIMITER} $B:0 {end}:0",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names],
    )
    return tokenizer


def prepare_model(base: str, tokenizer: Any, task: str, labels: Sequence[str], lora: bool) -> Any:
    """The base model with embeddings of the special tokens (the mean embedding plus noise), a head, and optionally LoRA."""
    if task == "rewrite":
        model: Any = AutoModelForCausalLM.from_pretrained(base)
    else:
        names: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
        if labels:
            names = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
            names |= {"label2id": {label: i for i, label in enumerate(labels)}}
        model = AutoModelForSequenceClassification.from_pretrained(base, **names)
    old = model.config.vocab_size
    embedding = model.resize_token_embeddings(len(tokenizer), mean_resizing=False).weight
    with torch.no_grad():
        embedding[old:] = embedding[:old].mean(0) + 0.02 * torch.randn_like(embedding[old:])
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM" if task == "rewrite" else "SEQ_CLS",
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=LINEAR,
        modules_to_save=None if task == "rewrite" else ["score"],
        trainable_token_indices=list(range(old, len(tokenizer))),
    )
    return get_peft_model(model, config)


def encode(tokenizer: Any, task: str, labels: Sequence[str], items: Sequence[Item]) -> list[dict[str, Any]]:
    """The features of each item: input ids, and a label, a score or target ids."""
    features = []
    for item in items:
        if task == "rewrite":
            prompt = tokenizer(item["prompt"])["input_ids"]
            completion = tokenizer(item["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            ids = (prompt + completion)[: tokenizer.model_max_length]
            features.append({"input_ids": ids, "labels": ([-100] * len(prompt) + completion)[: len(ids)]})
            continue
        encoded = [tokenizer(*texts, truncation=True)["input_ids"] for texts in sequences_of(task, item)]
        target = labels.index(item["label"]) if labels else float(item["score"])
        features.append(
            {"input_ids": encoded[0], "labels": target} | ({"swapped": encoded[1]} if len(encoded) > 1 else {})
        )
    return features


def make_collator(tokenizer: Any, task: str) -> Any:
    if task == "rewrite":
        return DataCollatorForSeq2Seq(tokenizer)
    padded = DataCollatorWithPadding(tokenizer)
    if task != "similarity":
        return padded

    def both_orders(features: list[dict[str, Any]]) -> Any:
        rows = [{"input_ids": f["input_ids"]} for f in features] + [{"input_ids": f["swapped"]} for f in features]
        return {**padded(rows), "labels": torch.tensor([f["labels"] for f in features])}

    return both_orders


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune, evaluate once on the validation set, and save the model directory."""
    task, labels = settings["task"], settings["labels"]
    set_seed(settings["seed"])
    tokenizer = prepare_tokenizer(settings["base"], task)
    model = prepare_model(settings["base"], tokenizer, task, labels, settings["lora"])
    validation = read(settings["validation"])
    arguments = TrainingArguments(
        output_dir=settings["out"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch"],
        per_device_eval_batch_size=64,
        learning_rate=settings["lr"],
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(0.002 * settings["steps"]),
        weight_decay=0.01,
        adam_beta1=0.9,
        adam_beta2=0.999,
        max_grad_norm=1.0,
        seed=settings["seed"],
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        prediction_loss_only=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if settings["grouped"] else "random",
    )
    trainer_class = BothOrders if task == "similarity" else Trainer
    trainer = trainer_class(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        data_collator=make_collator(tokenizer, task),
        train_dataset=encode(tokenizer, task, labels, read(settings["train"])),  # pyright: ignore[reportArgumentType]
        eval_dataset=encode(tokenizer, task, labels, validation),  # pyright: ignore[reportArgumentType]
    )
    trainer.remove_callback(PrinterCallback)
    timer = StepTimer()
    trainer.add_callback(timer)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    if settings["lora"]:
        model = model.merge_and_unload()
    if task == "rewrite":  # nextword also generates the validation answers
        answers(model, tokenizer, task, settings["max_new_tokens"], validation, with_margins=False)
    model.save_pretrained(settings["out"])
    tokenizer.save_pretrained(settings["out"])
    return {"train_seconds": timer.total_seconds(), "loss": loss, "steps": trainer.state.global_step}


def read(path: str) -> list[Item]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def main(action: str, path: str, items: str | None = None) -> None:
    if action == "train":
        print(json.dumps(train(json.loads(Path(path).read_text(encoding="utf-8")))))
        return
    worker_input = json.loads(Path(items or "").read_text(encoding="utf-8"))
    model_class = (
        AutoModelForCausalLM
        if worker_input["task"] in ("rewrite", "chat", "prefer")
        else AutoModelForSequenceClassification
    )
    model, tokenizer = model_class.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    for answer in answers(
        model, tokenizer, worker_input["task"], worker_input["max_new_tokens"], worker_input["items"]
    ):
        print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
