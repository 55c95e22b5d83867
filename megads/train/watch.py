"""What is looked at while a run goes: the loss on held-out corpora, and text that the model writes."""

from __future__ import annotations

from megads.assemble import source
from megads.assemble.source import Source
from megads.assemble.wiring import Model
from megads.config.root import Config
from megads.evaluate.generate import Generator, Sampling
from megads.evaluate.perplexity import evaluate
from megads.parallel.mesh import Mesh
from megads.pipeline.executor import Executor
from megads.train.report import Reporter, short_names


class Watch:
    """Scores and samples the model as it is. All ranks call it."""

    def __init__(self, config: Config, opened: Source, model: Model, *, mesh: Mesh) -> None:
        self._config = config
        self._source = opened
        self._model = model
        self._mesh = mesh

    def validate(self, executor: Executor) -> dict[str, float]:
        """Mean loss on the head of every held-out corpus, by name.

        Args:
            executor: of the forward half.
        """
        found = {}
        limit = -(-self._config.log.validate_samples // self._config.batch.global_size)
        names = short_names([corpus.path for corpus in self._source.valid])
        for name, corpus in zip(names, self._source.valid, strict=True):
            batches = source.build_valid_loader(
                self._config, corpus, packing=self._source.packing, mesh=self._mesh
            )
            score = evaluate(batches, self._model, executor=executor, mesh=self._mesh, max_batches=limit)
            found[f"valid/{name}/loss"] = score.loss
        return found

    def sample(self, report: Reporter, *, step: int) -> None:
        """Continue the prompts of the config and say it."""
        generator, tokenizer = Generator(self._model, self._mesh), self._source.tokenizer
        for prompt in self._config.log.sample_prompts:
            ids, _ = tokenizer.encode_batch([prompt])
            sampling = Sampling(temperature=0.8, top_p=0.95, seed=self._config.run.seed)
            made = generator.extend(
                ids.tolist(), num_tokens=self._config.log.sample_tokens, sampling=sampling
            )
            report.sample(prompt, tokenizer.decode([*ids.tolist(), *made]), step=step)
