"""The Python API: a model, and what one can ask of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, Unpack

import gossamer
from gossamer.chat import Answer, ChatFormat, Tool, ToolUse
from gossamer.engine.chat_template import Message, read_chat_template, use_chat_template
from gossamer.engine.endings import is_token_list
from gossamer.engine.engine import Engine
from gossamer.engine.intake import Prompt
from gossamer.engine.results import Output as AnyOutput
from gossamer.engine.stats import EngineStats
from gossamer.errors import ConfigurationError, InvalidSamplingParamsError, RequestError, UnsupportedModelError
from gossamer.models.generation import check_generation_config, end_token_ids, sampling_defaults
from gossamer.models.lora_config import check_adapter_names
from gossamer.nn.quantize import QuantizationReport
from gossamer.options import OptionArguments, Options, is_integer, with_option_signature
from gossamer.outputs import BeamSearchOutput, EmbeddingOutput, RankedDocument, RequestOutput, ScoreOutput
from gossamer.pooling.loading import find_task, load_pooling
from gossamer.pooling.model import PoolingModel
from gossamer.pooling.refusals import generates_no_text, makes_no_embeddings
from gossamer.progress import Progress
from gossamer.runners.kv_digest import kv_digest
from gossamer.runners.loading import load_for_runner
from gossamer.sampling_params import BeamSearchParams, SamplingParams

Ending = str | Sequence[int]  # of a prompt
OnError = Literal["raise", "return"]
Output = TypeVar("Output", RequestOutput, ScoreOutput, BeamSearchOutput)


class LLM:
    """A model on this machine, ready to serve many prompts that share prefixes.

    Args:
        model: a catalogue name (``gossamer pull`` lists them), a directory, a ``.gguf`` file, or a Hugging Face id.
        lora: LoRA adapters that requests may ask for: name -> directory, as PEFT writes it.
        options: by name, those of :class:`~gossamer.options.ModelOptions`, :class:`~gossamer.options.RunnerOptions`,
            :class:`~gossamer.options.EngineOptions` and :class:`~gossamer.options.ConversationOptions`;
            ``help(LLM.__init__)`` lists them.

    Attributes:
        options: what it was loaded with.
        task: what it is for: ``generate``, ``embed`` or ``score``.
        tokenizer: the Hugging Face tokenizer.
        model_path: the directory, or GGUF file, the model was loaded from.
        adapters: names of the adapters, and which model each was trained on, if it says so.
        runner_note: why the native runner is not used, if it might have been; otherwise empty.
        sparse_weights: how many int8 layers are packed without their zeros, and what was measured to decide it; or
            ``None`` if the native runner is not used.
        quantization_report: which layers became int8 and which did not, or ``None``.
        stored_weights: how the GGUF file that the weights came from stored them, such as ``Q4_1``, or ``None``.
        weights: what is computed with: ``as stored: Q4_K 169, Q6_K 29`` (types of blocks, and how many matrices),
            ``int8``, ``float32`` and so on.
        weights_note: why the weights of a GGUF file are not used as they are stored, if they might have been; otherwise
            empty.
        sampling_defaults: what the model's authors advise (``temperature``, ``top_p``, ``top_k``, ``min_p``,
            ``repetition_penalty``), by its ``generation_config.json`` or what the option ``generation_config`` says
            instead. ``gossamer chat``, the server and batches follow it where a request says nothing else;
            ``SamplingParams()`` does not.

    Raises:
        ModelNotFoundError, UnsupportedModelError, CheckpointError, DownloadError, ConfigurationError, AdapterError

    Example::

        from gossamer import LLM, SamplingParams

        llm = LLM("smollm2-135m")
        for output in llm.generate(["The capital of France is", "2 + 2 ="], SamplingParams(temperature=0)):
            print(output.outputs[0].text)
    """

    @with_option_signature
    def __init__(
        self,
        model: str | Path,
        *,
        lora: Mapping[str, str | Path] | None = None,
        **options: Unpack[OptionArguments],
    ) -> None:
        """Load a model.

        Args:
            model: a catalogue name, a directory, a ``.gguf`` file, or a Hugging Face id.
            lora: adapters that requests may ask for: name -> directory.
            options: see below.
        """
        self.options = Options.of(options)  # refused before the weights are read
        check_generation_config(self.options.conversation.generation_config)
        read_chat_template(
            self.options.conversation.chat_template
        )  # that it is there is seen before the weights are read
        self.model_name = str(model)
        self.task = find_task(model, self.options.model.task)
        self.adapters: dict[str, str | None] = {}
        self._engine: Engine | None = None
        self._pooling: PoolingModel | None = None
        self.sampling_defaults: dict[str, float] = {}
        self.quantization_report: QuantizationReport | None = None
        self.stored_weights: str | None = None
        self.sparse_weights: dict[str, Any] | None = None
        self._calls = 0
        self._prompts = 0
        self._streams: dict[str, RequestOutput | None] = {}  # by request: the output that was not read yet
        check_adapter_names(lora or {}, self.model_name)
        if self.task == "generate":
            self._load_generating(model, lora)
        elif lora:
            raise ConfigurationError(
                f"adapters are for models that generate text; {self.model_name} is not used for that"
            )
        elif self.options.model.tensor_parallel > 1:
            raise ConfigurationError(
                f"tensor_parallel is for models that generate text; {self.model_name} is not used for that"
            )
        else:
            self._load_pooling(model, self.task)

    def _load_pooling(self, model: str | Path, task: Literal["embed", "score"]) -> None:
        self._pooling, self.model_path = load_pooling(model, task, self.options)
        self.tokenizer = self._pooling.texts.tokenizer
        self.runner_note, self.weights, self.weights_note = self._pooling.note, self._pooling.weights, ""

    def _load_generating(self, model: str | Path, lora: Mapping[str, str | Path] | None) -> None:
        engine, sampler = self.options.engine, None
        if self.options.model.tensor_parallel > 1:
            from gossamer.runners.tensor_parallel import load_sharded  # and torch.distributed

            loaded, sampler = load_sharded(model, self.options, lora)
        else:
            loaded = load_for_runner(
                model,
                self.options.model,
                self.options.runner,
                max_rows=engine.most_rows,
                max_seqs=engine.max_num_seqs,
                adapters=lora,
            )
        self.adapters = {adapter.name: adapter.base for adapter in loaded.adapters}
        network, self.tokenizer, self.model_path = loaded.network, loaded.tokenizer, loaded.path
        self.runner_note, self.weights, self.weights_note = loaded.runner_note, loaded.weights, loaded.weights_note
        self.quantization_report = getattr(getattr(network, "hf_quantizer", None), "report", None)
        eos = end_token_ids(network, self.tokenizer, self.model_name)
        self.sampling_defaults = sampling_defaults(
            network, self.model_name, self.options.conversation.generation_config
        )
        use_chat_template(self.tokenizer, self.options.conversation.chat_template)
        self.stored_weights = getattr(network.config, "gguf_file_type", None)
        self.sparse_weights = loaded.runner.report().sparse_weights
        digest = kv_digest(loaded, self.options.model, self.options.runner) if engine.prefix_dir is not None else ""
        self._engine = Engine(
            loaded.runner, self.tokenizer, engine, eos_token_ids=eos, kv_digest=digest, sampler=sampler
        )

    @property
    def engine(self) -> Engine:
        """What generates text.

        Raises:
            UnsupportedModelError: the model is used for something else.
        """
        if self._engine is None:
            raise generates_no_text(self.model_name, self.task)
        return self._engine

    @property
    def pooling(self) -> PoolingModel:
        """What makes vectors or scores of texts.

        Raises:
            UnsupportedModelError: the model is used for something else.
        """
        if self._pooling is None:
            raise makes_no_embeddings(self.model_name)
        return self._pooling

    @property
    def generates(self) -> bool:
        """Whether the model generates text."""
        return self._engine is not None

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest text: prompt and answer, or what is embedded."""
        return self.engine.max_model_len if self._pooling is None else self._pooling.max_length

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine is None:
            return
        for request_id in list(self.engine.requests):
            self.engine.abort(request_id)
        self.engine.tree.evict(self.engine.budget.total)
        self.close()

    def close(self) -> None:
        """Write to ``prefix_dir`` what waits for it, for some seconds at most; the end of the process does so too."""
        if self._engine is not None:
            self._engine.close()

    # --- generation --------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        adapter: str | None = None,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Complete prompts. Shared prefixes among them, at any depth, are found and computed once.

        Args:
            prompts: strings, or ``{"prompt_token_ids": [...]}``; one or many. A mapping may name an ``adapter`` of its
                own, or ``None`` for the model itself.
            sampling_params: one for all, or one per prompt.
            use_tqdm: show a progress bar (when standard error is a terminal).
            adapter: the name of one of :attr:`adapters`, for prompts that name none.
            on_error: what to do about prompts that cannot be served, after all others are finished: ``"raise"`` the
                first error, with all outputs in its ``outputs``, or ``"return"`` outputs that carry ``error``.

        Returns:
            One output per prompt, in the same order.

        Raises:
            RequestError: see ``on_error``; it names the request by its place, ``prompt-3``.
        """
        many = _with_adapter(_as_list(prompts), adapter)
        # Neighbours in this order share the longest prefixes, so they run together even when memory is short.
        order = sorted(range(len(many)), key=lambda place: _sort_key(many[place]))
        return self._complete([partial(_itself, each) for each in many], sampling_params, use_tqdm, on_error, order)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        tools: ToolUse | Sequence[Tool] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_reasoning_tokens: int | None = None,
        adapter: str | None = None,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Answer one conversation, or many: each a list of ``{"role": ..., "content": ...}``.

        Args:
            tools: functions that answers may call, or a :class:`~gossamer.chat.ToolUse` that says more about it. Each
                call is valid under its schema. ``output.outputs[0].answer`` holds calls, content and thoughts.
            chat_template_kwargs: more variables of the chat template, such as ``enable_thinking``.
            max_reasoning_tokens: thoughts of an answer end after so many tokens, and the answer goes on.
            adapter: the name of one of :attr:`adapters`.

        Raises:
            ConfigurationError: the model has no chat template.
            RequestError: as in :meth:`generate`.
        """
        self._check_chat_template()
        assert self.chat_format is not None
        use = tools if isinstance(tools, ToolUse) else ToolUse(list(tools))
        variables = dict(chat_template_kwargs or {})
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if one else list(messages)
        write = partial(self.apply_chat_template, tools=use.tools, template_kwargs=variables)
        prompts = [partial(_chat_prompt, write, each, adapter) for each in conversations]
        params = [
            self._as_answers(each, use, variables, max_reasoning_tokens)
            for each in _one_each(sampling_params, len(prompts))
        ]
        outputs = self._complete(prompts, params, use_tqdm, on_error, range(len(prompts)))
        for completion in (each for output in outputs for each in output.outputs):
            reader = self.chat_format.reader(use, variables)
            completion.answer = Answer.read(completion.text, reader)
        return outputs

    def _as_answers(
        self, params: SamplingParams, use: ToolUse, variables: Mapping[str, Any], max_reasoning_tokens: int | None
    ) -> SamplingParams:
        """The parameters of answers that may call tools, or begin with thoughts."""
        chat = self.chat_format
        assert chat is not None
        if chat.needs_special_tokens(use):
            params = replace(params, skip_special_tokens=False)
        if params.reasoning is None and params.detokenize:
            params = replace(params, reasoning=chat.reasoning(variables, max_reasoning_tokens))
        form, given = chat.form(use, variables), params.structured_outputs
        if form is None:
            form = None if given is None else chat.after_thoughts(given, variables)
            return replace(params, structured_outputs=form)
        if given is not None:
            raise InvalidSamplingParamsError("tools and structured_outputs cannot both be given", param="tools")
        return replace(params, structured_outputs=form)

    def _complete(
        self,
        prompts: Sequence[Callable[[], Prompt]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        on_error: OnError,
        order: Iterable[int],
    ) -> list[RequestOutput]:
        """Generate for prompts, which are functions because making one may fail; queue them in ``order``."""
        params = _one_each(sampling_params, len(prompts))
        first = self._prompts
        self._prompts += len(prompts)

        def add(place: int, request_id: str) -> None:
            # the place, not the order of arrival, decides what is drawn: a new prompt changes nothing for the others
            self.engine.add_request(request_id, prompts[place](), params[place], draw=first + place)

        return self._serve(len(prompts), add, RequestOutput, use_tqdm, on_error, order)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, yielding the output so far after every token. Leaving the loop aborts the request."""
        (request_id,) = self._new_ids("stream", 1)
        (prompt,) = _with_adapter([prompt], adapter)
        self.engine.add_request(request_id, prompt, sampling_params or SamplingParams(), stream=True)
        self._streams[request_id] = None
        try:
            while True:
                output, self._streams[request_id] = self._streams[request_id], None
                if output is not None:
                    if output.error is not None:
                        raise output.error
                    yield output
                    if output.finished:
                        return
                elif request_id in self.engine.requests:
                    self._step()
                else:
                    return  # aborted
        finally:
            del self._streams[request_id]
            self.engine.abort(request_id)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        use_tqdm: bool = True,
        *,
        adapter: str | None = None,
        on_error: OnError = "raise",
    ) -> list[BeamSearchOutput]:
        """The ``params.beam_width`` best continuations of each prompt; the prompt is computed once for all beams.

        The hypotheses are those of transformers' ``generate(num_beams=..., early_stopping=False)``.

        Raises:
            RequestError: as in :meth:`generate`.
        """
        if not isinstance(params, BeamSearchParams):
            raise InvalidSamplingParamsError(f"params must be BeamSearchParams, got {type(params).__name__}")
        many = _with_adapter(_as_list(prompts), adapter)

        def add(place: int, request_id: str) -> None:
            self.engine.add_beam_search(request_id, many[place], params)

        return self._serve(len(many), add, BeamSearchOutput, use_tqdm, on_error)

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Sequence[Ending] | Sequence[Sequence[Ending]] | None = None,
        use_tqdm: bool = True,
        *,
        delimiter: str = "",
        adapter: str | None = None,
        on_error: OnError = "raise",
    ) -> list[ScoreOutput]:
        """Log-likelihoods (natural) of prompts, or of candidate endings of them.

        Args:
            prompts: one or many.
            continuations: candidate endings, texts or lists of token ids: one list for all prompts, or one per prompt.
                All are scored in one shared pass, which computes each common prefix once. The tokens of a text are
                those that it adds to the prompt: ``encode(prompt + text)`` without ``encode(prompt)``. (If the border
                falls inside a token, those that it has behind other texts.)
            delimiter: stands between a prompt and each text, and is scored with it: a space, if these are words.
            adapter: as in :meth:`generate`.

        Returns:
            One :class:`~gossamer.outputs.ScoreOutput` per prompt: ``token_logprobs`` of the prompt, or
            ``continuations[i].logprob`` and ``.token_logprobs`` of each ending and ``best``, the likeliest one's index.

        Raises:
            RequestError: as in :meth:`generate`.
        """
        if not isinstance(delimiter, str):
            raise ConfigurationError(f"delimiter must be a string, got {type(delimiter).__name__}")
        many = _with_adapter(_as_list(prompts), adapter)
        endings = self._endings_for(many, continuations)

        def add(place: int, request_id: str) -> None:
            prompt, tails = many[place], None
            if continuations is not None:
                tails = self.engine.intake.encode_endings(endings[place], prompt, request_id, delimiter=delimiter)
            self.engine.add_score(request_id, prompt, tails)

        return self._serve(len(many), add, ScoreOutput, use_tqdm, on_error)

    # --- embeddings --------------------------------------------------------------------------------------------

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        use_tqdm: bool = True,
        *,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingOutput]:
        """The vectors of texts. They are computed by length, without padding.

        Args:
            prompts: strings, or ``{"prompt_token_ids": [...]}``; one or many.
            use_tqdm: show a progress bar (when standard error is a terminal).
            dimensions: the first so many numbers, brought to length 1 again; for models that were trained so.
            normalize: to length 1, so that a product of two is their cosine.
            truncate_prompt_tokens: keep so many tokens of the beginning of each text; -1 is as many as the model reads.

        Returns:
            One output per prompt, in the same order.

        Raises:
            UnsupportedModelError: the model is made to generate text; ``LLM(model, task="embed")`` embeds all the same.
            RequestError: a prompt is empty, too long, or no text; it is named by its place, and nothing is computed.

        Example::

            from gossamer import LLM

            one, other = LLM("all-minilm-l6-v2").embed(["A cat sleeps.", "A kitten naps."])
            print(float(one.embedding @ other.embedding))
        """
        model = self.pooling
        if model.task != "embed":
            raise UnsupportedModelError(f"{self.model_name} scores pairs of texts, and makes no embeddings; use rank()")
        model.check_dimensions(dimensions)
        inputs = []
        for place, prompt in enumerate(_as_list(prompts)):
            given: Any = prompt
            if isinstance(prompt, Mapping):
                given = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt.get("prompt")
            inputs.append(model.texts.encode(given, f"prompts[{place}]", truncate_prompt_tokens))
        with Progress(len(inputs), enabled=use_tqdm) as progress:
            rows = model.compute(inputs, progress.advance)
        vectors = model.finish(rows, dimensions, normalize=normalize).numpy()
        return [EmbeddingOutput(vector, tokens.ids) for vector, tokens in zip(vectors, inputs, strict=True)]

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        use_tqdm: bool = True,
        *,
        top_n: int | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[RankedDocument]:
        """Documents in the order in which they answer a query: by a cross-encoder, or by the cosine of embeddings.

        Args:
            query: a text.
            documents: texts.
            use_tqdm: show a progress bar (when standard error is a terminal).
            top_n: only the best so many.
            truncate_prompt_tokens: see :meth:`embed`; of a cross-encoder, for query and document together.

        Raises:
            UnsupportedModelError, RequestError: as in :meth:`embed`.
        """
        if top_n is not None and (not is_integer(top_n) or top_n < 1):
            raise ConfigurationError(f"top_n must be at least 1, got {top_n!r}")
        if isinstance(documents, str):
            raise ConfigurationError("documents is one text; give a list of them")
        ranking = self.pooling.ranking([query], documents, truncate_prompt_tokens)
        with Progress(len(ranking.inputs), enabled=use_tqdm) as progress:
            rows = self.pooling.compute(ranking.inputs, progress.advance)
        return [RankedDocument(place, score, documents[place]) for place, score in ranking.best_first(rows, top_n)]

    # --- the rest ----------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """What was computed and what was saved since this object was made."""
        if self.engine.store is not None:
            self.engine.stats.prefix_store = self.engine.store.stats.to_dict()
        if self.engine.speculator is not None:
            self.engine.stats.speculation = self.engine.speculator.report()
        self.engine.stats.prefix_tolerance = self.engine.runner.report().prefix_tolerance
        return self.engine.stats

    @cached_property
    def chat_format(self) -> ChatFormat | None:
        """How the model writes calls and thoughts; ``None`` for one that is not made for conversations."""
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        return ChatFormat(self.tokenizer, self.options.conversation.template_kwargs)

    @cached_property
    def fingerprint(self) -> str:
        """``fp_`` and ten digits that change with the version, the model, what it is computed with, and the options."""
        said = [gossamer.__version__, str(self.model_path), self.weights, self.runner_note, self.options.changed()]
        return "fp_" + hashlib.sha256(repr(said).encode()).hexdigest()[:10]

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tokenizer: Any = None,
    ) -> list[int]:
        """A conversation as token ids, up to where the assistant's answer begins.

        Args:
            tools: functions that the model is told of.
            template_kwargs: more variables of the template, such as ``enable_thinking``.
            add_generation_prompt: go on to there; otherwise end with the last message.
            continue_final_message: end within the last message, which the answer goes on with.
            tokenizer: a copy of the model's, for other threads.

        Raises:
            ConfigurationError: the model has no chat template.
            InvalidPromptError: a message is none, or the template refuses them.
        """
        self._check_chat_template()
        assert self.chat_format is not None
        return self.chat_format.prompt_ids(
            messages,
            tools,
            template_kwargs,
            tokenizer=tokenizer,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def pin(self, prompt: Prompt) -> int:
        """Keep a prefix's keys and values in memory once they are computed; returns its number of tokens."""
        return self.engine.pin(prompt)

    def unpin(self, prompt: Prompt) -> None:
        """Undo one :meth:`pin` of the same prefix."""
        self.engine.unpin(prompt)

    def _check_chat_template(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigurationError(
                "this model has no chat template: it was not trained for conversations; use generate()"
            )

    def _serve(
        self,
        count: int,
        add: Callable[[int, str], None],
        kind: type[Output],
        use_tqdm: bool,
        on_error: OnError,
        order: Iterable[int] | None = None,
    ) -> list[Output]:
        """Queue ``count`` requests and step until all have ended; if interrupted, forget those that have not."""
        if on_error not in ("raise", "return"):
            raise ConfigurationError(f"on_error must be 'raise' or 'return', got {on_error!r}")
        ids = self._new_ids("prompt", count)
        outputs: dict[str, Output] = {}
        try:
            for place in range(count) if order is None else order:
                try:
                    add(place, ids[place])
                except RequestError as error:
                    error.request_id = ids[place]
                    outputs[ids[place]] = kind(request_id=ids[place], prompt_token_ids=[], error=error)
            waiting = set(ids) - outputs.keys()
            with Progress(len(waiting), enabled=use_tqdm) as progress:
                while waiting:
                    for output in self._step():
                        if output.request_id in waiting and isinstance(output, kind):
                            waiting.discard(output.request_id)
                            outputs[output.request_id] = output
                            progress.advance()
                    progress.describe(self.engine.stats)
        finally:
            for request_id in (each for each in ids if each not in outputs):
                self.engine.abort(request_id)
        ordered = [outputs[each] for each in ids]
        errors = [output.error for output in ordered if output.error is not None]
        if errors and on_error == "raise":
            errors[0].outputs = list(ordered)
            raise errors[0]
        return ordered

    def _step(self) -> list[AnyOutput]:
        """One step for all. Outputs of streams are kept for their readers, who may not be the ones that asked."""
        outputs = self.engine.step()
        for output in outputs:
            if output.request_id in self._streams and isinstance(output, RequestOutput):
                self._streams[output.request_id] = output
        return outputs

    def _new_ids(self, kind: str, count: int) -> list[str]:
        """``prompt-0`` ... in the first call; later calls add their number, since ids must be unique in the engine."""
        call = f"{self._calls}-" if self._calls else ""
        self._calls += 1
        return [f"{call}{kind}-{place}" for place in range(count)]

    def _endings_for(self, prompts: list[Prompt], continuations: Any) -> list[Any]:
        """What was given for each prompt; whether it is a list of endings is checked with the prompt."""
        if continuations is None:
            return [None] * len(prompts)
        if not isinstance(continuations, Sequence) or isinstance(continuations, (str, bytes)):
            raise ConfigurationError(
                "continuations must be a list of strings or of lists of token ids, or one such list per prompt, got "
                f"{type(continuations).__name__}"
            )
        if all(isinstance(each, str) or is_token_list(each) for each in continuations):
            return [continuations] * len(prompts)
        if len(continuations) != len(prompts):
            raise ConfigurationError(
                f"{len(prompts)} prompts but {len(continuations)} lists of continuations; give one for all, or one each"
            )
        return list(continuations)


def _itself(prompt: Prompt) -> Prompt:
    return prompt


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    # What is no prompt either is refused later, by name.
    one = isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable)
    return [prompts] if one else list(prompts)  # type: ignore[list-item]


def _sort_key(prompt: Prompt) -> tuple[str, int, Any]:
    # Comparable whatever was passed: what is no prompt, or no list of integers, is refused later, by name.
    given = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
    adapter, ids, text = str(given.get("adapter") or ""), given.get("prompt_token_ids"), given.get("prompt")
    if isinstance(ids, Sequence):
        return adapter, 1, [token for token in ids if isinstance(token, int)]
    return adapter, 0, text if isinstance(text, str) else ""


def _chat_prompt(
    write: Callable[[Sequence[Message]], list[int]], messages: Sequence[Message], adapter: str | None
) -> Prompt:
    return {"prompt_token_ids": write(messages), "adapter": adapter}


def _with_adapter(prompts: list[Prompt], adapter: str | None) -> list[Prompt]:
    """The prompts, those that name no adapter with this one."""
    if adapter is None:
        return prompts
    # What is no prompt is refused later, by name.
    return [
        {"adapter": adapter, **each} if isinstance(each, Mapping) else {"adapter": adapter, "prompt": each}
        for each in prompts
    ]


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, (str, bytes)) or not isinstance(params, Sequence):
        return [params] * count  # one for all; its type is checked with each prompt
    if len(params) != count:
        raise InvalidSamplingParamsError(f"{count} prompts but {len(params)} sampling_params; give one, or one each")
    return list(params)
