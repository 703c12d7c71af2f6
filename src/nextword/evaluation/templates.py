"""What is fixed in a report's page and in a model card; `report` fills it in."""

from string import Template

CARD = Template("""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- nextword
---

# $name

This is $kind: a GPT that continues text, trained from random weights with nextword.
$state
| | |
|---|---|
$rows

It was trained on this text alone and on no instructions. It continues text in its manner and knows nothing else; what it
says is not checked against anything.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("model")
model = AutoModelForCausalLM.from_pretrained("model")
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=100, do_sample=True)
print(tokenizer.decode(ids[0]))
```
$sample$command""")

STYLE = """\
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

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title · training report</title>
<style>
$style</style>
</head>
<body>
<main>
<header>
<h1>$title</h1>
<p>$subtitle</p>
<dl>
$headline
</dl>
</header>
$figures
$samples
$tables
$command
$messages
<footer>Made by nextword from the files of the run folder.</footer>
</main>
</body>
</html>
""")
