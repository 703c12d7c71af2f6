"""The stock library beside this program: what `transformers` answers with a directory, and a fine-tuning by its Trainer.

    python -m benchmarks.transformers_worker answer DIRECTORY ITEMS
    python -m benchmarks.transformers_worker train SETTINGS

ITEMS is {"task", "room", "items"}: the examples' fields, and how many tokens an answer may have. `answer` prints one JSON
object an item: label, score or text; and how far it is ahead of another answer (in logits, or nats): `margin`, or of a
text `leads`, of each of its tokens, and `ends`, how long the text is with it.
SETTINGS is what `benchmarks.fine_tuning` writes: directories, files and numbers. `train` prints the seconds of its loop. Nothing
of this program's own code is imported here.
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
    model: Any, tokenizer: Any, task: str, room: int, items: Sequence[Item], explained: bool = True
) -> list[dict[str, Any]]:
    """What a stock model says of each item, by the ways that its documentation shows."""
    model.eval()
    with torch.inference_mode():
        if task in ("rewrite", "chat"):
            prompts = [prompt_of(tokenizer, task, item, room) for item in items]
            return write(model, tokenizer, prompts, room, explained)
        if task == "prefer":
            return [prefer(model, tokenizer, item) for item in items]
        sides = [texts_of(task, item) for item in items]
        logits = head_logits(model, tokenizer, [one for several in sides for one in several])
    found, start = [], 0
    for several in sides:
        rows = logits[start : start + len(several)]
        start += len(several)
        if task == "similarity" and rows.shape[1] == 1:
            found.append({"score": float(rows.sum()), "margin": 0.0})
            continue
        each = rows[:, 0] if task == "choose" else rows.sum(0)
        best = int(each.argmax())
        answer = best if task == "choose" else model.config.id2label[best]
        found.append({"label": answer, "margin": margin(each)})
    return found


def margin(logits: Tensor) -> float:
    """How far the best is ahead of the second."""
    first, second = logits.topk(2).values.tolist()
    return first - second


def texts_of(task: str, item: Item) -> list[tuple[str, ...]]:
    """The sequences of an item: a text or two each."""
    if task == "classify":
        return [(item["text"],)]
    if task == "entail":
        return [(item["premise"], item["hypothesis"])]
    if task == "similarity":
        one, two = item["sentence1"], item["sentence2"]
        return [(one, two), (two, one)]
    return [(item["question"], choice) for choice in item["choices"]]


def head_logits(model: Any, tokenizer: Any, texts: Sequence[tuple[str, ...]]) -> Tensor:
    """[N, labels] of texts, or pairs, in batches of about one length."""
    encoded = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True)["input_ids"]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), ROWS):
        some = order[start : start + ROWS]
        batch = tokenizer.pad({"input_ids": [encoded[i] for i in some]}, padding_side="right", return_tensors="pt")
        found |= dict(zip(some, model(**batch).logits.float(), strict=True))
    return torch.stack([found[i] for i in range(len(encoded))])


def prompt_of(tokenizer: Any, task: str, item: Item, room: int) -> tuple[int, ...]:
    """The ids that an answer follows: a text in its template, cut at its end; a conversation, cut at its beginning."""
    left = tokenizer.model_max_length - room
    if task == "rewrite":
        return tuple(tokenizer(item["prompt"], truncation=True, max_length=left)["input_ids"])
    messages = item["messages"]
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tuple(ids[-left:])


def write(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[int, ...]], room: int, explained: bool = True
) -> list[dict[str, Any]]:
    """The likeliest continuation of each prompt."""
    distinct = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    for start in range(0, len(distinct), ROWS):
        some = distinct[start : start + ROWS]
        batch = tokenizer.pad({"input_ids": [list(one) for one in some]}, padding_side="left", return_tensors="pt")
        done = model.generate(
            **batch, do_sample=False, max_new_tokens=room, output_scores=explained, return_dict_in_generate=True
        )
        said = done.sequences[:, batch["input_ids"].shape[1] :].tolist()
        for row, (prompt, ids) in enumerate(zip(some, said, strict=True)):
            ids = ids[: next((i + 1 for i, token in enumerate(ids) if token in stops(model)), len(ids))]
            found[prompt] = {"text": tokenizer.decode(ids, skip_special_tokens=True)}
            if explained:
                shown = [tokenizer.decode(ids[: i + 1], skip_special_tokens=True) for i in range(len(ids))]
                found[prompt]["leads"] = [margin(done.scores[i][row]) for i in range(len(ids))]
                found[prompt]["ends"] = [len(text) for text in shown]
    return [found[prompt] for prompt in prompts]


def stops(model: Any) -> list[int]:
    """The tokens at which the model's own generation config ends a text."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def prefer(model: Any, tokenizer: Any, item: Item) -> dict[str, Any]:
    """The answer of the two that has the greater log-probability."""
    start = tokenizer.apply_chat_template(item["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
    sums = []
    for answer in (item["chosen"], item["rejected"]):
        turn = {"role": "assistant", "content": answer}
        ids = torch.tensor([tokenizer.apply_chat_template([*item["messages"], turn], return_dict=True)["input_ids"]])
        ids = ids[:, : tokenizer.model_max_length]
        learned = F.log_softmax(model(ids).logits.float()[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
        sums.append(float(learned[len(start) - 1 :].double().sum()))
    difference = sums[0] - sums[1]
    return {"label": "chosen" if difference > 0 else "rejected", "score": difference, "margin": abs(difference)}


# ---------------------------------------------------------------- fine-tuning by the stock Trainer


class BothOrders(Trainer):
    """Squared error of the score that the two orders of a pair make together, as the collator has laid them."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, 0].view(2, -1).sum(0)
        loss = F.mse_loss(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss


class Times(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def whole(self) -> float:
        """The seconds of all steps, the first of them taken to be like the others."""
        return (self.ends[-1] - self.ends[0]) * len(self.ends) / max(1, len(self.ends) - 1)


def prepare_tokenizer(base: str, task: str) -> Any:
    """The base's tokenizer with the task's markers, and its template around one text or two."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(base)
    names = [START, DELIMITER] if task == "rewrite" else [START, DELIMITER, EXTRACT]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    end = DELIMITER if task == "rewrite" else EXTRACT
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A {end}", pair=f"{START} $A {DELIMITER} $B:0 {end}:0",
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names],
    )  # fmt: skip
    return tokenizer


def prepare_model(base: str, tokenizer: Any, task: str, labels: Sequence[str], lora: bool) -> Any:
    """The base with rows for the markers (an average token's, and a little noise), a head, and perhaps an adapter."""
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
        task_type="CAUSAL_LM" if task == "rewrite" else "SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.0,
        target_modules=LINEAR, modules_to_save=None if task == "rewrite" else ["score"],
        trainable_token_indices=list(range(old, len(tokenizer))),
    )  # fmt: skip
    return get_peft_model(model, config)


def encode(tokenizer: Any, task: str, labels: Sequence[str], items: Sequence[Item]) -> list[dict[str, Any]]:
    """The features of each item: ids, and its label, its score, or which ids are learned."""
    features = []
    for item in items:
        if task == "rewrite":
            prompt = tokenizer(item["prompt"])["input_ids"]
            said = tokenizer(item["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            ids = (prompt + said)[: tokenizer.model_max_length]
            features.append({"input_ids": ids, "labels": ([-100] * len(prompt) + said)[: len(ids)]})
            continue
        both = [tokenizer(*texts, truncation=True)["input_ids"] for texts in texts_of(task, item)]
        gold = labels.index(item["label"]) if labels else float(item["score"])
        features.append({"input_ids": both[0], "labels": gold} | ({"turned": both[1]} if len(both) > 1 else {}))
    return features


def make_collator(tokenizer: Any, task: str) -> Any:
    if task == "rewrite":
        return DataCollatorForSeq2Seq(tokenizer)
    padded = DataCollatorWithPadding(tokenizer)
    if task != "similarity":
        return padded

    def both_orders(features: list[dict[str, Any]]) -> Any:
        rows = [{"input_ids": f["input_ids"]} for f in features] + [{"input_ids": f["turned"]} for f in features]
        return {**padded(rows), "labels": torch.tensor([f["labels"] for f in features])}

    return both_orders


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune, look at the held-out examples once, save a stock directory."""
    task, labels = settings["task"], settings["labels"]
    set_seed(settings["seed"])
    tokenizer = prepare_tokenizer(settings["base"], task)
    model = prepare_model(settings["base"], tokenizer, task, labels, settings["lora"])
    held_out = read(settings["validation"])
    arguments = TrainingArguments(
        output_dir=settings["out"], max_steps=settings["steps"], per_device_train_batch_size=settings["batch"],
        per_device_eval_batch_size=64, learning_rate=settings["lr"], lr_scheduler_type="linear",
        warmup_steps=math.ceil(0.002 * settings["steps"]), weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.999,
        max_grad_norm=1.0, seed=settings["seed"], use_cpu=True, report_to="none", disable_tqdm=True,
        logging_strategy="no", save_strategy="no", eval_strategy="no", prediction_loss_only=True,
        dataloader_num_workers=0, dataloader_pin_memory=False, remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if settings["grouped"] else "random",
    )  # fmt: skip
    kind = BothOrders if task == "similarity" else Trainer
    trainer = kind(
        model=model, args=arguments, processing_class=tokenizer, data_collator=make_collator(tokenizer, task),
        train_dataset=encode(tokenizer, task, labels, read(settings["train"])),  # pyright: ignore[reportArgumentType]
        eval_dataset=encode(tokenizer, task, labels, held_out),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    times = Times()
    trainer.add_callback(times)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    if settings["lora"]:
        model = model.merge_and_unload()
    if task == "rewrite":  # a translation is looked at in words as well
        answers(model, tokenizer, task, settings["room"], held_out, explained=False)
    model.save_pretrained(settings["out"])
    tokenizer.save_pretrained(settings["out"])
    return {"train_seconds": times.whole(), "loss": loss, "steps": trainer.state.global_step}


def read(path: str) -> list[Item]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def main(action: str, path: str, items: str | None = None) -> None:
    if action == "train":
        print(json.dumps(train(json.loads(Path(path).read_text(encoding="utf-8")))))
        return
    asked = json.loads(Path(items or "").read_text(encoding="utf-8"))
    kind = (
        AutoModelForCausalLM if asked["task"] in ("rewrite", "chat", "prefer") else AutoModelForSequenceClassification
    )
    model, tokenizer = kind.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    for answer in answers(model, tokenizer, asked["task"], asked["room"], asked["items"]):
        print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
