"""Runs the trials of a sweep with Ray Tune.

Tune decides when a trial starts, by the resources that are free, and carries its reports to the
scheduler. Which trials there are, and how they ended, stands in the journal.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ray import tune
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from pipelines.common import storage
from pipelines.common.cluster import ray_storage
from pipelines.common.termination import EXIT_SIGTERM
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.journal import TUNE_STATE, Journal, Trial
from pipelines.sweep.population import Population
from pipelines.sweep.scheduler import STEP, RememberingASHA, Reports
from pipelines.sweep.search import judged, next_setting
from pipelines.sweep.space import Parameter, SpaceError, in_words
from pipelines.sweep.trial import job_of, read_fault, resources, run_trial, trial_config
from pipelines.train import run_folder
from stgt.errors import SettingError

logger = logging.getLogger(__name__)

MOST_ATTEMPTS = 100
"""Choices for one setting that the config may refuse, before the sweep gives up."""


class TrialSource(Searcher):
    """Gives Tune the trials of a sweep: unfinished ones first, then new ones."""

    def __init__(
        self,
        config: SweepConfig,
        space: Mapping[str, Parameter],
        settings: int,
        journal: Journal,
        asha: RememberingASHA | None,
        population: Population | None,
        ended: Callable[[str], None],
    ) -> None:
        """Offer trials.

        Args:
            config: Config of the sweep.
            space: The searched parameters.
            settings: Number of settings to try.
            journal: The trials so far.
            asha: The scheduler, which knows the trials that it stopped.
            population: Decides in place of the search, for population-based training.
            ended: Called with the name of a trial that ended.
        """
        super().__init__(metric=config.metric, mode="max")
        self._config, self._space, self._settings = config, space, settings
        self._journal, self._asha, self._ended = journal, asha, ended
        self._population = population
        self._unfinished = deque(journal.unfinished())
        self._names: dict[str, str] = {}
        self._active: set[str] = set()
        self.error: SpaceError | None = None
        """Why no more settings could be chosen; Tune would wrap an error that is raised here."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial, or that there are no more."""
        if self._population is not None:
            job = self._population.next_job(self._active)
            if job is None:
                over = self._population.is_over(self._active)
                return Searcher.FINISHED if over else None
        else:
            try:
                trial = self._next()
            except SpaceError as error:
                self.error = error
                trial = None
            if trial is None:
                return Searcher.FINISHED
            job = job_of(trial)
        self._names[trial_id] = job["trial"]
        self._active.add(job["trial"])
        return dict(job)

    def _next(self) -> Trial | None:
        if self._unfinished:
            return self._unfinished.popleft()
        return self._begun()

    def _begun(self) -> Trial | None:
        """Decide on the next trial: a repeat of a setting, or a new setting."""
        journal, seed = self._journal, self._config.train.seed
        trials = sorted(journal.trials.values(), key=lambda one: one.number)
        repeats = Counter(one.setting for one in trials)
        for trial in trials:
            done = repeats[trial.setting]
            if done < self._config.repeats:
                return journal.begin(trial.setting, seed + done, trial.values)
        number = len(repeats)
        if number >= self._settings:
            return None
        before = judged(journal.outcomes(), self._config.repeats)
        for attempt in range(MOST_ATTEMPTS):
            values = next_setting(
                self._config.search, self._space, number, before, seed, self._settings, attempt
            )
            try:
                trial_config(self._config, "new", seed, values)
            except SettingError as error:
                if attempt == 0:
                    logger.info("another setting is chosen: %s", error)
                refused = error
            else:
                return journal.begin(number, seed, values)
        raise SpaceError(
            f"{MOST_ATTEMPTS} settings in a row were refused; narrow the space; the last one: "
            f"{refused}"
        )

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record how a trial ended."""
        name = self._names[trial_id]
        self._active.discard(name)
        if self._population is not None and not error and self._waits_for_others(name):
            return
        found = result or {}
        stopped = self._asha.stopped.get(name) if self._asha is not None else None
        if stopped is not None:
            step, metric = found[STEP], found[self._config.metric]
            self._journal.end(name, "stopped", step, metric, stopped)
        elif not settle(self._journal, name, self._config.metric):
            reason = "its process ended several times" if error else "it ended without a result"
            step = self._last_step(name)
            self._journal.end(name, "failed", step, None, f"{reason}; see Ray's logs")
        self._ended(name)

    def _waits_for_others(self, name: str) -> bool:
        """Return whether a member of a population has not ended: it paused, or is replaced."""
        fault = read_fault(self._journal.folder(name))
        if fault is not None:
            return fault["diverged"]
        paused = run_folder.latest(self._journal.folder(name)) is not None
        return paused and self._journal.result(name) is None

    def _last_step(self, name: str) -> int:
        return max(
            (step for step, _ in self._journal.reports(name, self._config.metric)), default=0
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out of Tune's own state, which is never read."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the journal holds everything."""

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing: the journal holds everything."""


def settle(journal: Journal, name: str, metric: str) -> bool:
    """Record the end of a trial whose training has ended; return whether it has.

    The metric of a finished trial is that of the checkpoint that the training delivers: the best,
    or the last one without a choice.
    """
    folder = journal.folder(name)
    reports = journal.reports(name, metric)
    if (result := journal.result(name)) is not None:
        best = result.get("best")
        step = result["step"] if best is None else best["step"]
        value = next((value for at, value in reversed(reports) if at == step), None)
        journal.end(name, "finished", result["step"], value)
        return True
    fault = read_fault(folder)
    if fault is None:
        return False
    step = reports[-1][0] if reports else 0
    journal.end(name, "diverged" if fault["diverged"] else "failed", step, None, fault["reason"])
    return True


class Progress(tune.Callback):
    """Logs the starts and the reports of trials."""

    def __init__(self, metric: str, steps_of: Callable[[Mapping[str, Any]], int]) -> None:
        self._metric = metric
        self._steps_of = steps_of

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Log the start of a trial."""
        job = trial.config
        logger.info("%s starts: %s, seed %d", job["trial"], in_words(job["values"]), job["seed"])

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        """Log a report."""
        if self._metric not in result:
            return
        logger.info(
            "%s: step %s of %d, %s %.1f",
            trial.config["trial"],
            result[STEP],
            self._steps_of(trial.config),
            self._metric,
            result[self._metric],
        )


def run_trials(
    config: SweepConfig,
    space: Mapping[str, Parameter],
    settings: int,
    num_samples: int,
    journal: Journal,
    parent_id: str | None,
    ended: Callable[[str], None],
) -> None:
    """Run the trials of a sweep that have not ended.

    Args:
        config: Config of the sweep.
        space: The searched parameters.
        settings: Number of settings to try.
        num_samples: Samples per epoch of the training data.
        journal: The trials so far; it is continued.
        parent_id: MLflow run of the sweep.
        ended: Called with the name of a trial that ended.

    Raises:
        KeyboardInterrupt: The sweep was interrupted.
    """

    def steps_of(job: Mapping[str, Any]) -> int:
        train = trial_config(config, job["trial"], job["seed"], job["values"])
        return train.steps_for(num_samples)

    asha = None
    if config.uses_asha:
        reports = {name: journal.reports(name, config.metric) for name in journal.trials}
        over = journal.ends.keys()
        asha = RememberingASHA(
            config.metric,
            config.first_rung,
            config.reduction_factor,
            steps_of,
            ended={name: found for name, found in reports.items() if name in over},
            unfinished={name: found for name, found in reports.items() if name not in over},
        )
        _stop_what_was_to_be_stopped(journal, asha, reports, steps_of, ended)

    population = None
    if config.search == "pbt":
        steps = config.train.steps_for(num_samples)
        population = Population(config, space, settings, steps, journal)
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, config=config, parent_id=parent_id),
        lambda job: resources(config, job),
    )
    storage.remove(storage.join(config.output, TUNE_STATE))
    source = TrialSource(config, space, settings, journal, asha, population, ended)
    tuner = Tuner(
        trainable,
        tune_config=TuneConfig(
            num_samples=-1,
            search_alg=source,
            scheduler=asha or FIFOScheduler(),
            reuse_actors=True,
            max_concurrent_trials=config.max_concurrent_trials,
            trial_name_creator=_name,
            trial_dirname_creator=_folder_name,
        ),
        run_config=RunConfig(
            name=f"{TUNE_STATE}/{uuid.uuid4().hex[:8]}",
            verbose=0,
            callbacks=[Progress(config.metric, steps_of)],
            failure_config=FailureConfig(max_failures=config.train.max_failures),
            **ray_storage(config.output),
        ),
    )
    with _interruptible():
        tuner.fit()
    if source.error is not None:
        raise source.error
    storage.remove(storage.join(config.output, TUNE_STATE))


def _stop_what_was_to_be_stopped(
    journal: Journal,
    asha: RememberingASHA,
    reports: Mapping[str, Reports],
    steps_of: Callable[[Mapping[str, Any]], int],
    ended: Callable[[str], None],
) -> None:
    """Record trials that ASHA stops by their last report, if no driver lived to do so."""
    for trial in journal.unfinished():
        found = reports[trial.name]
        if not found:
            continue
        step, value = found[-1]
        went_on = (run_folder.latest(journal.folder(trial.name)) or 0) > step
        if went_on or step >= steps_of(job_of(trial)):
            continue
        reason = asha.missed_stop(trial.name)
        if reason is not None:
            journal.end(trial.name, "stopped", step, value, reason)
            ended(trial.name)


def _name(trial: Any) -> str:
    return trial.config["trial"]


def _folder_name(trial: Any) -> str:
    """Return a folder for Tune's files; the parts of a member's training need one each."""
    until = trial.config["until"]
    return _name(trial) if until is None else f"{_name(trial)}_{until}"


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt if Tune was interrupted; Tune itself returns as if it had finished.

    Tune sets a handler of SIGINT, which ends the trials and restores the handler that was set
    before. Without an interrupt, Tune leaves its own handler. SIGTERM is passed on to it: an
    exception that a handler raises in the middle of one of Ray's calls may end the process at once.

    Raises:
        KeyboardInterrupt: Tune was interrupted.
        SystemExit: Tune was ended by SIGTERM.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or int(os.environ.get("TUNE_DISABLE_SIGINT_HANDLER", "0")):
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    terminated = threading.Event()

    def pass_on(number: int, frame: FrameType | None) -> None:
        terminated.set()
        signal.signal(signal.SIGTERM, at_term)  # a second one ends the process at once
        os.kill(os.getpid(), signal.SIGINT)

    at_term = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    except KeyboardInterrupt:  # Tune had not set its handler yet
        if not terminated.is_set():
            raise
    finally:
        signal.signal(signal.SIGTERM, at_term)
    if terminated.is_set():
        raise SystemExit(EXIT_SIGTERM)
    if signal.getsignal(signal.SIGINT) is before:
        raise KeyboardInterrupt
    signal.signal(signal.SIGINT, before)
