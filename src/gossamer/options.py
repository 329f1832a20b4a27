"""What can be said about how a model is loaded and served: every option, its default, its meaning and its check, once.

They are grouped by who reads them: :func:`~gossamer.models.load.load_model` takes :class:`ModelOptions`, the runner
:class:`RunnerOptions`, the engine :class:`EngineOptions`, what
writes conversations :class:`ConversationOptions`. :class:`gossamer.LLM` takes all of them by name, and commands
make their flags of the same fields (:mod:`gossamer.cli.engine_options`).

>>> EngineOptions(memory="512MiB").memory_bytes
536870912
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, get_args, get_type_hints

from gossamer.errors import ConfigurationError
from gossamer.sizes import parse_bytes

Criterion = Literal["absolute", "relative"]
Outliers = Literal["batch", "token", "static"]
RunnerChoice = Literal["auto", "native", "transformers"]
KVDtype = Literal["auto", "float32", "bfloat16", "int8"]
SparseWeights = Literal["auto", "on", "off"]
WeightsChoice = Literal["auto", "as-stored", "dequantized", "int8"]
SharingMode = Literal["attention", "storage", "off"]
Speculation = Literal["auto", "off"]
Task = Literal["auto", "generate", "embed", "score"]
DTYPES = ("auto", "float32", "bfloat16", "float16")
SHARING_MODES: tuple[SharingMode, ...] = get_args(SharingMode)
_DIGEST = re.compile(r"[0-9a-f]{64}")


def option(default: Any, help: str, **about: Any) -> Any:
    """A field with its meaning.

    Args:
        default: its value if nothing is said.
        help: for people, in ``--help`` and :func:`help`.
        about: ``min`` and ``max`` are limits that a command line checks as well; ``compare`` says what there is to see
            in ``gossamer bench decode`` with several values.
    """
    return field(default=default, metadata={"help": help} | about)


def check_decomposition(threshold: float, criterion: str, outliers: str | None) -> None:
    """Refuses settings of the decomposition of LLM.int8() that have no meaning.

    Raises:
        ConfigurationError: names the setting and what it may be.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold > 0:
        raise ConfigurationError(
            f"threshold must be a number greater than 0, got {threshold!r}; outliers=None switches outliers off"
        )
    if criterion not in get_args(Criterion):
        raise ConfigurationError(f"criterion must be 'absolute' or 'relative', got {criterion!r}")
    if outliers is not None and outliers not in get_args(Outliers):
        raise ConfigurationError(f"outliers must be 'batch', 'token', 'static' or None, got {outliers!r}")


def is_integer(value: object) -> bool:
    """Whether it is an integer, which a truth value is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name} must be {', '.join(map(repr, choices))}, got {value!r}")


@dataclass(frozen=True)
class ModelOptions:
    """What a model is loaded as."""

    dtype: str = option("auto", "Number format of the weights: auto, float32, bfloat16 or float16.")
    quantization: Literal["int8"] | None = option(
        None,
        "int8: make the linear layers int8 while they are read (LLM.int8()); a GGUF file in Q8_0 is that already, and "
        "stays as it is.",
    )
    weights: WeightsChoice = option(
        "auto",
        "What is computed with: as-stored (the quantized blocks of a GGUF file, in its own size), dequantized (such "
        "weights in floating point), int8 (LLM.int8(), whatever is stored) or auto (as stored where the native runner "
        "can, otherwise dequantized).",
    )
    int8_threshold: float = option(
        6.0, "With int8: entries beyond this are outliers and are multiplied in floating point."
    )
    int8_criterion: Criterion = option(
        "relative", "With int8: relative (to the mean magnitude of the token) or absolute (the paper's)."
    )
    int8_outliers: Outliers | None = option(
        "token", "With int8: token (single entries), batch (whole columns, the paper's), static or none."
    )
    int8_head: bool = option(False, "Make the output layer int8 too; LLM.int8() leaves it as it is.")
    device: str = option("cpu", "Where the model runs, such as cpu or cuda:0.")
    task: Task = option(
        "auto",
        "What the model is for: generate (text), embed (vectors of texts), score (pairs of texts) or auto (what its "
        "checkpoint was made for).",
    )
    tensor_parallel: int = option(
        1,
        "Experimental: processes that share the weights of a model that is too large for one machine, with torchrun; "
        "for batch, and Python programs of your own.",
        min=1,
    )

    def __post_init__(self) -> None:
        _check_choice("task", self.task, get_args(Task))
        if self.dtype not in DTYPES:
            raise ConfigurationError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.quantization not in (None, "int8"):
            raise ConfigurationError(f"quantization must be None or 'int8', got {self.quantization!r}")
        _check_choice("weights", self.weights, get_args(WeightsChoice))
        if self.int8:
            check_decomposition(self.int8_threshold, self.int8_criterion, self.int8_outliers)
        if self.quantization and self.weights in ("as-stored", "dequantized"):
            raise ConfigurationError(
                f"weights={self.weights!r} and quantization='int8' exclude each other: leave weights out for int8, "
                "which is made of what a file stores, or leave quantization out"
            )
        if self.weights == "as-stored" and self.dtype != "auto":
            raise ConfigurationError(
                f"weights='as-stored' keeps the file's own blocks, so dtype cannot be {self.dtype!r}; "
                "weights='dequantized' makes numbers of that type of them"
            )
        if self.weights == "as-stored" and self.int8_head:
            raise ConfigurationError(
                "weights='as-stored' keeps the output layer as the file has it: leave int8_head out"
            )
        if not is_integer(self.tensor_parallel) or self.tensor_parallel < 1:
            raise ConfigurationError(f"tensor_parallel must be at least 1, got {self.tensor_parallel!r}")
        if self.tensor_parallel > 1:
            self._check_tensor_parallel()

    def _check_tensor_parallel(self) -> None:
        if self.int8 or self.int8_head or self.weights == "as-stored":
            raise ConfigurationError(
                "tensor_parallel shares weights in floating point: leave quantization, int8_head and weights out"
            )
        if self.device != "cpu":
            raise ConfigurationError(f"tensor_parallel computes on CPUs, so device cannot be {self.device!r}")
        if self.task not in ("auto", "generate"):
            raise ConfigurationError(f"tensor_parallel is for models that generate text, not for task={self.task!r}")

    @property
    def int8(self) -> bool:
        """Whether the linear layers become int8."""
        return self.quantization == "int8" or self.weights == "int8"

    @property
    def may_stay_stored(self) -> bool:
        """Whether nothing that was said keeps weights from being computed with as a file stores them."""
        undecided = self.weights == "auto" and self.dtype == "auto" and not self.int8 and not self.int8_head
        return undecided or self.weights == "as-stored"

    @property
    def may_stay_in_8_bits(self) -> bool:
        """Whether int8 was asked for, and nothing else that weights stored in 8 bits already would not give."""
        return self.quantization == "int8" and ModelOptions() == replace(
            self, quantization=None, int8_head=False, device="cpu"
        )


@dataclass(frozen=True)
class RunnerOptions:
    """What computes the model, and how."""

    runner: RunnerChoice = option(
        "auto",
        "What computes the model: native (kernels of our own, on a CPU; most models of "
        "the Llama, Qwen, Gemma, Phi, OLMo, Granite, GLM, Cohere, Mistral, GPT and Mixtral families), "
        "transformers (any supported model) or auto (the first where it can).",
    )
    kv_dtype: KVDtype = option(
        "auto",
        "Number format of keys and values in the native runner: float32, bfloat16, int8 (half the memory of "
        "bfloat16) or auto (float32 for a model in float32, otherwise bfloat16).",
    )
    sparse_weights: SparseWeights = option(
        "auto",
        "How the native runner keeps int8 layers that are stored without their zeros: on (without, in less "
        "memory), off (with them) or auto (as this machine multiplies each shape faster; up to half a second of "
        "measuring for each). "
        "The results are the same.",
        compare="Several, such as off,on, decode in turn, to see what leaving the zeros of a pruned int8 model out "
        "gains.",
    )
    prefix_eps: float = option(
        0.0,
        "Attend to long shared prefixes within this tolerance, and faster; native runner only. The error is "
        "measured and kept near or below it. 0 is exact; 0.05 is a good first value.",
        min=0.0,
        max=0.99,
        compare="Several, such as 0,0.05, decode in turn, to see what it gains. It needs some steps to settle: give 60 "
        "or more with --new.",
    )

    batch_invariant: bool = option(
        False,
        "Answer every request the same, to the last bit, whatever else is computed with it; native runner only. "
        "Without it rounding differs, and with it, now and then, a token that is drawn or nearly a tie.",
        compare="off,on decode in turn, to see what it costs.",
    )

    def __post_init__(self) -> None:
        _check_choice("runner", self.runner, get_args(RunnerChoice))
        _check_choice("kv_dtype", self.kv_dtype, get_args(KVDtype))
        if self.kv_dtype != "auto" and self.runner == "transformers":
            raise ConfigurationError(
                "kv_dtype is for the native runner; that of transformers keeps the model's own type"
            )
        _check_choice("sparse_weights", self.sparse_weights, get_args(SparseWeights))
        eps = self.prefix_eps
        if not 0 <= eps < 1:
            raise ConfigurationError(f"prefix_eps must be at least 0, which is exact, and less than 1, got {eps!r}")
        if eps and self.runner == "transformers":
            raise ConfigurationError("prefix_eps is for the native runner; that of transformers attends exactly")
        if eps and self.kv_dtype == "int8":
            raise ConfigurationError("prefix_eps needs keys and values in bfloat16 or float32, not in int8")
        if self.batch_invariant and self.runner == "transformers":
            raise ConfigurationError("batch_invariant is for the native runner; the products of PyTorch round by shape")
        if self.batch_invariant and eps:
            raise ConfigurationError(
                "batch_invariant and prefix_eps exclude each other: a tolerance is spent on what is shared at the time"
            )

    @property
    def exact(self) -> bool:
        """Whether attention to prefixes has no tolerance."""
        return not self.prefix_eps

    def exactly(self) -> Self:
        """The same without a tolerance."""
        return replace(self, prefix_eps=0.0)


@dataclass(frozen=True)
class EngineOptions:
    """How requests share one model."""

    sharing: SharingMode = option(
        "attention",
        "What requests with a common prefix share: attention (one product for all of them), "
        "storage (keys and values only) or off.",
    )
    memory: str | int = option("4GB", "Budget for keys and values, such as 4GB.")
    max_model_len: int | None = option(
        None, "Longest prompt plus answer, in tokens; the model's context by default.", min=1
    )
    max_num_seqs: int = option(256, "Sequences computed at a time.", min=1)
    max_num_batched_tokens: int = option(2048, "Tokens computed in one forward pass.", min=1)
    state_interval: int | None = option(
        None,
        "Tokens after which the state of recurrent layers is kept on the way through a long prefix, so that a prompt "
        "that parts from it there can go on; by default as many as have keys and values of a state's size.",
        min=1,
    )
    seed: int = option(0, "Where the random streams of requests without a seed come from.")
    speculation: Speculation = option(
        "auto",
        "Several tokens per step: auto verifies tokens that stand somewhere already (in the prompt, in the answer, in "
        "others' answers below the same prefix) as far as that is faster, with the same result; off never does.",
    )
    speculative_config: str | Mapping[str, Any] | None = option(
        None,
        'Bounds on that, as vLLM\'s option of this name: a JSON object such as {"method": "ngram", '
        '"num_speculative_tokens": 5}.',
    )
    prefix_dir: str | Path | None = option(
        None,
        "Keep prefixes on disk, in this directory: those that are pinned, and those that several requests begin with, "
        "are there after a restart, and are read instead of computed. Several processes may share it.",
    )
    prefix_dir_size: str | int = option(
        "4GB", "Size of the prefix files in --prefix-dir; those that were not used for longest are removed for others."
    )
    prefix_dir_salts: str | Sequence[str] | None = option(
        None,
        "SHA-256 digests, in hexadecimal digits and with commas between them, of the cache_salts whose prefixes may be "
        "kept in --prefix-dir too; those of other salts stay in memory.",
    )

    def __post_init__(self) -> None:
        parse_bytes(self.memory)
        parse_bytes(self.prefix_dir_size)
        if self.sharing not in SHARING_MODES:
            raise ConfigurationError(f"sharing must be one of {', '.join(SHARING_MODES)}, got {self.sharing!r}")
        _check_choice("speculation", self.speculation, get_args(Speculation))
        if self.speculation == "off" and self.speculative_config is not None:
            raise ConfigurationError("speculative_config bounds what speculation='off' switches off; leave one out")
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if not is_integer(value) or value < 1:
                raise ConfigurationError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.state_interval is not None and not (is_integer(self.state_interval) and self.state_interval > 0):
            raise ConfigurationError(f"state_interval must be an integer of at least 1, got {self.state_interval!r}")
        if not is_integer(self.seed):
            raise ConfigurationError(f"seed must be an integer, got {self.seed!r}")
        if self.prefix_dir is not None and not (isinstance(self.prefix_dir, str | Path) and str(self.prefix_dir)):
            raise ConfigurationError(f"prefix_dir must be the path of a directory, got {self.prefix_dir!r}")
        if self.prefix_dir is not None and self.sharing == "off":
            raise ConfigurationError("prefix_dir keeps what requests share, and with sharing 'off' they share nothing")
        if self.prefix_dir_digests and self.prefix_dir is None:
            raise ConfigurationError("prefix_dir_salts says what is kept in prefix_dir, which is not given")

    @property
    def memory_bytes(self) -> int:
        return parse_bytes(self.memory)

    @property
    def prefix_dir_bytes(self) -> int:
        return parse_bytes(self.prefix_dir_size)

    @property
    def prefix_dir_digests(self) -> frozenset[str]:
        """Those of ``prefix_dir_salts``, in lower case."""
        given = self.prefix_dir_salts
        if given is None:
            return frozenset()
        listed = given.split(",") if isinstance(given, str) else list(given) if isinstance(given, Sequence) else [None]
        digests = [each.strip().lower() if isinstance(each, str) else "" for each in listed]
        for place, digest in enumerate(digests, 1):
            if not _DIGEST.fullmatch(digest):
                # The value is not told: it may be a salt, which is a secret.
                raise ConfigurationError(
                    f"prefix_dir_salts: number {place} is no SHA-256 digest, which has 64 hexadecimal digits; give the "
                    "digest of the salt, as `printf %s SALT | sha256sum` prints it, not the salt"
                )
        return frozenset(digests)

    @property
    def most_rows(self) -> int:
        """Most tokens of a step: each sequence may have one."""
        return max(self.max_num_batched_tokens, self.max_num_seqs)


@dataclass(frozen=True)
class ConversationOptions:
    """How conversations are written, and how answers are drawn where nobody says it."""

    chat_template: str | None = option(
        None, "A file with another chat template than the model's own; or the template itself, if it holds a {."
    )
    default_chat_template_kwargs: str | Mapping[str, Any] | None = option(
        None,
        'Variables of the chat template, as a JSON object such as {"enable_thinking": false}, for conversations that '
        "do not give them.",
    )
    generation_config: str = option(
        "auto",
        "Where temperature, top_p, top_k, min_p and repetition_penalty come from if a request does not say them: auto "
        "(the model's generation_config.json), none (OpenAI's defaults) or a directory with such a file.",
    )

    def __post_init__(self) -> None:
        if not isinstance(self.generation_config, str) or not self.generation_config:
            raise ConfigurationError(
                f"generation_config must be 'auto', 'none' or a directory, got {self.generation_config!r}"
            )
        _ = self.template_kwargs

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The variables of the template."""
        given = self.default_chat_template_kwargs
        try:
            value = json.loads(given) if isinstance(given, str) else given
        except ValueError as error:
            raise ConfigurationError(f"default_chat_template_kwargs is no JSON: {error}") from None
        if not isinstance(value, Mapping | None):
            raise ConfigurationError(f"default_chat_template_kwargs must be a JSON object, got {given!r}")
        return dict(value or {})


class OptionArguments(TypedDict, total=False):
    """All options by name, as :class:`gossamer.LLM` takes them: for editors and type checkers."""

    dtype: str
    quantization: Literal["int8"] | None
    weights: WeightsChoice
    int8_threshold: float
    int8_criterion: Criterion
    int8_outliers: Outliers | None
    int8_head: bool
    device: str
    task: Task
    tensor_parallel: int
    runner: RunnerChoice
    kv_dtype: KVDtype
    sparse_weights: SparseWeights
    prefix_eps: float
    batch_invariant: bool
    sharing: SharingMode
    memory: str | int
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    state_interval: int | None
    seed: int
    speculation: Speculation
    speculative_config: str | Mapping[str, Any] | None
    prefix_dir: str | Path | None
    prefix_dir_size: str | int
    prefix_dir_salts: str | Sequence[str] | None
    chat_template: str | None
    default_chat_template_kwargs: str | Mapping[str, Any] | None
    generation_config: str


GROUPS = (ModelOptions, RunnerOptions, EngineOptions, ConversationOptions)


@dataclass(frozen=True)
class Options:
    """All options, by who reads them."""

    model: ModelOptions = ModelOptions()
    runner: RunnerOptions = RunnerOptions()
    engine: EngineOptions = EngineOptions()
    conversation: ConversationOptions = ConversationOptions()

    def __post_init__(self) -> None:
        if self.model.tensor_parallel == 1:
            return
        native = {"kv_dtype": "auto", "prefix_eps": 0.0, "batch_invariant": False}
        asked = [name for name, value in native.items() if getattr(self.runner, name) != value]
        if self.runner.runner == "native" or asked:
            raise ConfigurationError(
                f"tensor_parallel is for the runner of transformers: leave {(asked or ['runner'])[0]} out"
            )
        if self.engine.speculative_config is not None:
            raise ConfigurationError(
                "tensor_parallel verifies no drafts, because how many are worth it is a matter of each process's own "
                "time: leave speculative_config out"
            )
        if self.engine.prefix_dir is not None:
            raise ConfigurationError("tensor_parallel keeps no prefixes on disk: leave prefix_dir out")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Options by name.

        Raises:
            ConfigurationError: a name or a value has no meaning.

        >>> Options.of({"prefix_epsilon": 0.1})
        Traceback (most recent call last):
        gossamer.errors.ConfigurationError: there is no option 'prefix_epsilon'; did you mean 'prefix_eps'?
        """
        known = option_fields()
        for name in arguments:
            if name not in known:
                import difflib  # `--help` does without it

                close = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(known)}"
                raise ConfigurationError(f"there is no option {name!r}; {hint}")
        parts = [{name: arguments[name] for name in option_fields(group) if name in arguments} for group in GROUPS]
        return cls(*(group(**part) for group, part in zip(GROUPS, parts, strict=True)))

    def arguments(self) -> dict[str, Any]:
        """By name; :meth:`of` takes them back."""
        return asdict(self.model) | asdict(self.runner) | asdict(self.engine) | asdict(self.conversation)

    def changed(self) -> dict[str, Any]:
        """By name, those that are not at their default."""
        return {name: value for name, value in self.arguments().items() if value != option_fields()[name].default}


def option_fields(*groups: type[Any]) -> dict[str, Field[Any]]:
    """Fields by name, of the groups given or of all."""
    return {each.name: each for group in groups or GROUPS for each in fields(group)}


def option_parameters() -> list[Parameter]:
    """All options as parameters of a function."""
    hints = get_type_hints(OptionArguments)
    return [
        Parameter(name, Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[name])
        for name, each in option_fields().items()
    ]


def with_option_signature(function: Any) -> Any:
    """Shows the options in place of ``**options``, in signature and documentation of a function."""
    own = Signature.from_callable(function)
    before = [each for each in own.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
    function.__signature__ = own.replace(parameters=[*before, *option_parameters()])
    lines = [f"    {name}: {each.metadata['help']}" for name, each in option_fields().items()]
    function.__doc__ = "\n".join([function.__doc__ or "", "", "Options:", *lines])
    return function
