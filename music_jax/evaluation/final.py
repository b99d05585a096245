"""The evaluation that every training ends with."""

import logging

from etils import epath
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax.data import datasets
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.distributed.mesh import from_main_process
from music_jax.errors import NotMeasurableError, UserError
from music_jax.evaluation.protocols import final_protocols, read_final_results, run_protocols
from music_jax.evaluation.results import results_table
from music_jax.evaluation.run import Run, agreed_fingerprint
from music_jax.models.network import Network, Tree

_logger = logging.getLogger(__name__)


class FinalEvaluation:
    """The linear probe and kNN at the end of a training, if there are labeled images.

    Attributes:
      sources: Labeled images to learn from and to test on, or None.
    """

    def __init__(self, config: config_dict.ConfigDict, workdir: epath.Path, source: Source):
        """Opens the labeled images; all processes call this together.

        Args:
          config: The run's config.
          workdir: Workdir of the run.
          source: The training images.

        Raises:
          UserError: Images that `config.evaluation` names cannot be used, or only some of the
            processes find images.
        """
        self._config, self._workdir = config, workdir
        self.sources: datasets.EvaluationSources | None = None
        self._why_not = ""
        try:
            self.sources = datasets.evaluation_sources(config, source)
        except NotMeasurableError as error:
            if config.evaluation.train or config.evaluation.test:
                raise
            self._why_not = str(error)
            _logger.info(f"the backbone will not be probed: {error}")
        if from_main_process(lambda: self.sources is None) != (self.sources is None):
            raise UserError(
                "the processes do not find the same images to evaluate with; this one: "
                f"{self._why_not or 'there are some'}"
            )

    def is_done(self, step: int) -> bool:
        """Returns whether there is nothing to evaluate at a step; logs the results if so."""
        results = None
        if self.sources is not None:
            fingerprints = [agreed_fingerprint(source) for source in self.sources]
            results = from_main_process(
                lambda: read_final_results(self._config, self._workdir, step, fingerprints)
            )
            if results is None:
                return False
        done = "trained and evaluated" if results else "trained"
        _logger.info(f"{self._workdir} is done: {step} steps {done}")
        if results:
            progress.log_lines(_logger, results_table(results))
        return True

    def run(
        self,
        *,
        network: Network,
        params: Tree,
        batch_stats: Tree,
        step: int,
        mesh: Mesh,
        skipped: SkippedImages,
    ) -> dict[str, float]:
        """Evaluates a network, writes the results into the workdir and logs them.

        Args:
          network: The network.
          params: Its parameters.
          batch_stats: Its running statistics.
          step: Number of steps taken.
          mesh: The devices.
          skipped: Record of images that cannot be decoded.

        Returns:
          The top-1 accuracies by name.
        """
        if self.sources is None:
            _logger.info(f"not probed: {self._why_not}")
            return {}
        run = Run(
            config=self._config,
            workdir=self._workdir,
            sources=self.sources,
            images=self.sources.test,
            network=network,
            params=params,
            batch_stats=batch_stats,
            step=step,
            mesh=mesh,
            skipped=skipped,
        )
        run_protocols(run, final_protocols(self._config), force=True)
        results = from_main_process(lambda: read_final_results(self._config, self._workdir, step))
        results = results or {}
        if results:
            progress.log_lines(_logger, results_table(results))
        return {f"{name}_top1": result["top1"] for name, result in results.items()}
