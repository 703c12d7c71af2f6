"""What is fixed in a report's page and in a model card; `report` fills it in."""

from string import Template

PRETRAINING_CARD_TEMPLATE = Template("""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- nextword
$index---

# $name

This is $kind: a GPT that continues text, trained from random weights with nextword.
$state
| | |
|---|---|
$rows

It was trained on this text alone and on no instructions. It continues text in its manner and knows nothing else; what it
says is not checked against anything.
$measured
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("model")
model = AutoModelForCausalLM.from_pretrained("model")
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=100, do_sample=True)
print(tokenizer.decode(ids[0]))
```
$sample$command""")

TASK_CARD_TEMPLATE = Template("""\
---
library_name: transformers
pipeline_tag: $pipeline
tags:
- nextword
$index---

# $name

$about
$state
| | |
|---|---|
$rows
$scores$measured
## Use

With nextword, in this folder:

```bash
$shell
```

With transformers, in this folder:

```python
$python
```
$notes$adapter$sample$command""")

ADAPTER_TEMPLATE = Template("""
The folder `adapter` holds what was trained, for PEFT; it goes on top of the model that this one began with$base:

```python
$python
```
""")

# How the stock classes answer, by the kind of the task. Each prints its answer on the last line.
CLASSIFICATION_CODE_TEMPLATE = Template("""\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("model")
model = AutoModelForSequenceClassification.from_pretrained("model")
${setup}inputs = tokenizer($inputs, truncation=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
$answer""")

GENERATION_CODE_TEMPLATE = Template("""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("model")
model = AutoModelForCausalLM.from_pretrained("model")
$inputs
ids = model.generate(**inputs, max_new_tokens=$room, do_sample=$sampled)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))""")

CHAT_INPUTS_CODE = """\
messages = [{"role": "user", "content": "$prompt"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""

ADAPTER_CODE_TEMPLATE = Template("""\
from peft import PeftConfig, PeftModel
from transformers import $stock

base = PeftConfig.from_pretrained("adapter").base_model_name_or_path  # where it lay; name the folder if it has moved
model = $stock.from_pretrained(base$arguments)
model.resize_token_embeddings($vocabulary, mean_resizing=False)
model = PeftModel.from_pretrained(model, "adapter")""")

BASE_CSS = """\
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #24231f; --soft: #6a675f; --line: #e4e0d6; --tint: #f3f0e8;
  --train: #c0672f; --validation: #1f628f; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181b; --ink: #e9e6df; --soft: #a09d95; --line: #313339;
  --tint: #1f2125; --train: #e59c6b; --validation: #7fbce6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.6 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4rem) clamp(1rem, 4vw, 2rem); }
h1, h2, blockquote { font-family: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif; }
h1 { margin: 0; font-size: clamp(2rem, 6vw, 3rem); line-height: 1.1; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { margin: 0 0 1rem; font-size: 1.5rem; line-height: 1.2; }
p, header p { margin: 0.4rem 0 1.2rem; color: var(--soft); max-width: 42rem; }
section { margin-top: 3.5rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1.5rem; margin: 2.5rem 0 0;
  padding: 1.5rem 0; border: solid var(--line); border-width: 1px 0; }
dt, caption, figcaption, small, summary { color: var(--soft); font-size: 0.85rem; line-height: 1.4; }
dd { margin: 0.2rem 0 0; font-size: 1.8rem; line-height: 1.2; letter-spacing: -0.02em; white-space: nowrap; }
small { display: block; margin-top: 0.3rem; letter-spacing: 0; white-space: normal; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: 0.6rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 2.5rem; }
.tables { columns: 2 20rem; column-gap: 2.5rem; }
.tables table { break-inside: avoid; margin-bottom: 2rem; }
figure + .grid, details + .grid { margin-top: 2.5rem; }
.narrow { display: none; }
details { margin-top: 1rem; }
summary { cursor: pointer; }
table { width: 100%; border-collapse: collapse; font-size: 0.92rem; }
caption { padding-bottom: 0.4rem; text-align: start; text-transform: uppercase; letter-spacing: 0.08em; font-size: 0.75rem; }
th, td { padding: 0.35rem 0; border-top: 1px solid var(--line); vertical-align: top; }
th { padding-inline-end: 1rem; text-align: start; font-weight: 400; color: var(--soft); }
td { text-align: end; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.numbers { max-width: 28rem; margin-top: 0.6rem; }
.numbers th:not(:first-child) { text-align: end; padding: 0.35rem 0; }
ol, ul { margin: 0; padding: 0; list-style: none; }
ol li { display: grid; grid-template-columns: 5rem 1fr; padding: 1rem 0; border-top: 1px solid var(--line); }
ol li > div { min-width: 0; }
h3 { margin: 0; font-size: 0.92rem; font-weight: 400; color: var(--soft); line-height: 1.7; }
blockquote { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 1.05rem; max-width: 46rem; }
blockquote + blockquote { margin-top: 1rem; }
pre { margin: 0; padding: 1rem; border-radius: 0.5rem; background: var(--tint); white-space: pre-wrap;
  overflow-wrap: anywhere; font: 0.88rem/1.6 ui-monospace, monospace; }
.messages b { display: inline-block; min-width: 5rem; font-weight: 400; color: var(--soft); }
footer { margin-top: 4rem; color: var(--soft); font-size: 0.85rem; }
@media (max-width: 40rem) { .wide { display: none; } .narrow { display: block; } ol li { grid-template-columns: 1fr; }
  dl { grid-template-columns: 1fr 1fr; gap: 1.2rem; } dd { font-size: 1.6rem; } section { margin-top: 2.5rem; } }
"""

TASK_CSS = """\
.dots { max-width: 42rem; margin: 1.5rem 0; }
.dots > div { display: grid; grid-template-columns: minmax(5.5rem, 11rem) 1fr 3.6rem; gap: 0.8rem; align-items: center;
  padding: 0.3rem 0; font-size: 0.92rem; line-height: 1.3; color: var(--soft); }
.dots > .own { color: var(--ink); }
.dots > .axis { padding: 0; font-size: 0.8rem; }
.dots .number { text-align: end; font-variant-numeric: tabular-nums; }
.strip { position: relative; height: 1.5rem; }
.strip > * { position: absolute; top: 0; height: 100%; }
.strip u { width: 1px; margin-inline-start: -0.5px; background: var(--line); }
.strip i { top: calc(50% - 1.5px); height: 3px; border-radius: 2px; background: currentcolor; opacity: 0.45; }
.strip b { top: calc(50% - 5px); width: 10px; height: 10px; margin-inline-start: -5px; border-radius: 50%;
  background: currentcolor; }
.own .strip { color: var(--validation); }
.strip em { font-style: normal; transform: translateX(-50%); white-space: nowrap; }
.scores { max-width: 42rem; margin: 2rem 0 1rem; }
.scores th:not(:first-child) { text-align: end; padding-inline-end: 0; }
.scores td, .scores th:not(:first-child) { padding-inline-start: 0.6rem; }
.scores small { margin: 0; font-size: 0.8rem; }
.bars { max-width: 42rem; }
.bars th { width: 30%; overflow-wrap: anywhere; }
.bars td:last-child { width: 4.5rem; }
.bars span { display: block; height: 0.7rem; margin-top: 0.45rem; border-radius: 2px; background: var(--validation); }
p + .grid, .grid + details, .grid + p { margin-top: 2.5rem; }
@media (min-width: 40.01rem) { dl { grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); } }
@media (max-width: 40rem) { .dots > div { grid-template-columns: 6rem 1fr 3rem; gap: 0.5rem; } }
.sentence { display: block; font-size: clamp(1.6rem, 4.4vw, 2.3rem); line-height: 1.2; max-width: 48rem; }
"""

RESULTS_CSS = """\
.unseen { position: absolute; width: 1px; height: 1px; margin: -1px; overflow: hidden; clip-path: inset(50%); }
.scores th small { margin-top: 0.1rem; }
.dots.suites > div { color: var(--soft); }
.dots.suites > .own { color: var(--ink); }
.dots.suites .own .strip { color: var(--validation); }
.strip .chance { width: 2px; margin-inline-start: -1px; transform: none; background: var(--ink); opacity: 0.75; }
.strip s { top: calc(50% - 5px); width: 10px; height: 10px; margin-inline-start: -5px; border-radius: 50%;
  background: var(--paper); border: 2px solid currentcolor; }
.scores { max-width: 48rem; }
.scores th { min-width: 7rem; overflow-wrap: anywhere; }
.scores thead th { overflow-wrap: normal; min-width: 0; }
.findings tbody th { width: 60%; }
.findings td, .sideways td { white-space: nowrap; overflow-wrap: normal; }
.sideways td small { white-space: nowrap; }
.sideways { overflow-x: auto; margin-bottom: 2rem; }
.sideways .scores { margin-bottom: 0.4rem; }
.findings th small { max-width: 32rem; }
.findings .notable th, .findings .notable td { color: var(--ink); }
.mark { color: var(--train); }
.examples li { display: block; padding: 0.5rem 0; border-top: 1px solid var(--line); font-size: 0.85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.examples b { font-weight: 400; color: var(--soft); }
section > details { max-width: 48rem; }
"""

COMPARISON_CSS = """\
:root { --s1: #1f628f; --s2: #c0672f; --s3: #5f7f4f; --s4: #8a4f93; --s5: #a07a1c; --s6: #4a5560; }
@media (prefers-color-scheme: dark) {
  :root { --s1: #7fbce6; --s2: #e59c6b; --s3: #9dc489; --s4: #cf9bd8; --s5: #d9b75f; --s6: #aab4c0; } }
.dot { display: inline-block; width: 0.7rem; height: 0.7rem; margin-inline-end: 0.4rem; border-radius: 50%; }
.s1 { background: var(--s1); } .s2 { background: var(--s2); } .s3 { background: var(--s3); }
.s4 { background: var(--s4); } .s5 { background: var(--s5); } .s6 { background: var(--s6); }
.name { margin-inline-end: 1.2rem; white-space: nowrap; color: var(--ink); }
header p { max-width: none; line-height: 2; }
.sideways .several { max-width: none; width: auto; min-width: min(100%, 42rem); margin: 0.6rem 0 0.4rem; }
.several thead th { color: var(--ink); white-space: nowrap; }
.several td { min-width: 6rem; }
.of2 :is(td, thead th):not(:first-child) { width: 28%; }
.of3 :is(td, thead th):not(:first-child) { width: 20%; }
.several th:not(:first-child), .several td { text-align: end; padding-inline: 0.8rem 0; }
.axes { border: 0; margin: 0; padding: 0; min-width: 0; }
.axes input { accent-color: var(--validation); margin: 0 0.4rem 0 0; width: 1rem; height: 1rem; vertical-align: -2px; }
.axes label { margin-inline-end: 1.4rem; font-size: 0.92rem; line-height: 2.2; }
.by { display: none; margin-top: 1rem; }
#axis-step:checked ~ .by-step, #axis-tokens:checked ~ .by-tokens, #axis-seconds:checked ~ .by-seconds { display: block; }
section > h3 { margin: 1.6rem 0 0.6rem; color: var(--ink); font-weight: 600; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1.5rem 2.5rem; }
.beside h4 { margin: 0 0 0.4rem; font-size: 0.85rem; font-weight: 400; color: var(--soft); }
.beside blockquote { font-size: 0.98rem; }
"""

RUN_FOOTER = "Made by nextword from the files of the run folder."
COMPARISON_FOOTER = "Made by nextword from the files of the run folders."

PAGE_TEMPLATE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title · $kind</title>
<style>
$style</style>
</head>
<body>
<main>
<header>
<h1>$heading</h1>
<p>$subtitle</p>
$headline</header>
$parts
<footer>$footer</footer>
</main>
</body>
</html>
""")
