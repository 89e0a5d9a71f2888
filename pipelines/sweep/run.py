"""Searches the best settings of a training with Ray Tune. Each trial is a separate Ray Train run.

The journal in the sweep's folder says which trials there are and how they ended; the folder of each
trial holds its metrics and checkpoints. Everything else is computed from them: the next setting,
what the scheduler compares, the report, and what MLflow shows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from pipelines.artifacts.checkpoints import VOCAB
from pipelines.artifacts.training_run import origin_of
from pipelines.artifacts.vocabulary import share_vocabulary
from pipelines.common import storage, tracking
from pipelines.common.config import to_dict, without_credentials
from pipelines.common.lease import exclusive
from pipelines.common.output_folder import (
    CONFIG,
    JOB,
    RUN,
    claim_folder,
    config_record,
    settings_of,
)
from pipelines.common.provenance import About
from pipelines.common.recording import Recording
from pipelines.sweep import earlier, report
from pipelines.sweep.again import refit_config, reproduce
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.journal import TRIALS, Journal, Trial
from pipelines.sweep.outcome import TrialOutcome
from pipelines.sweep.ranking import SettingResult, best_setting
from pipelines.sweep.search import check_search
from pipelines.sweep.space import Parameter, check_values, in_words, read_space
from pipelines.train import preflight, run_folder
from pipelines.train.about import datasets_of
from pipelines.train.metrics_sender import MetricsSender
from stgt.errors import SettingError, STGTError
from stgt.field_marks import FieldMark, earlier_values, is_below, marked_fields

logger = logging.getLogger(__name__)

RESULT = "result.json"
DATA_DIGEST = "data_digest"
PAGE = "report.html"
NAMED = 8
"""Most differing settings to name."""
CLOSE_AFTER_S = 10.0
"""Seconds after which the training of a trial that was stopped has ended. It ends once its process
gets another trial, which is at once as long as there are any."""


class SweepSummary(TypedDict):
    """Result of `run_sweep`."""

    trials: int
    failed: int
    diverged: int
    stopped_early: int
    best_trial: str
    best_params: dict[str, Any]
    best_metric: float
    """Mean over the repeats of the best setting."""
    best_spread: float | None
    """Sample standard deviation over the repeats; None without repeats."""
    command: str
    """Command that trains the best setting again."""
    report: str
    refit_checkpoint: str | None
    run_id: str | None
    """Id of the MLflow run; None if MLflow could not be used."""
    seconds: float


def run_sweep(
    config: SweepConfig, connect: Callable[[SweepConfig], None] | None = None
) -> SweepSummary:
    """Try settings and return the best.

    An interrupted sweep resumes in the same folder.

    Args:
        config: Config of the sweep.
        connect: Connects to Ray. Called after all checks that do not need Ray.

    Raises:
        STGTError: A trial failed, no trial measured the metric, the space cannot be searched, or
            the folder contains a sweep with different settings.
        ClipStoreError: The clips do not suit the training.
        ValueError: The trials do not fit the cluster.
    """
    started = time.monotonic()
    train = replace(
        config.train,
        output=storage.resolve(config.output),
        tracking=tracking.resolve(config.train.tracking),
        # Trials deliver the checkpoint that is best by the metric they are compared by.
        select_metric=config.metric.partition("/")[2],
    )
    config = earlier.with_earlier_rules(replace(config, train=train))
    space = read_space(config.space, config.train)
    config = replace(config, space=tuple(f"{name}={one}" for name, one in space.items()))
    settings = check_search(config.search, space, config.trials)
    if config.search == "pbt":
        from pipelines.sweep import population

        population.check_space(space)
    data = _check(config, space)
    num_samples = data.plan.num_samples
    with exclusive(config.output):
        _claim(config, data.digest)
        # Trials run in folders of Tune, where a relative path would mean another file.
        train = preflight.with_architecture(preflight.with_absolute_paths(config.train))
        config = replace(config, train=train)
        config = _with_shared_vocabulary(config)
        recording = _recording(config, data, settings)

        def prepare() -> None:
            tracking.share_credentials(config.train.tracking)
            if connect is not None:
                connect(config)
            _check_resources(config)

        with recording.running(prepare):
            from pipelines.sweep.tuning import run_trials, settle

            journal = Journal(config.output)
            earlier.adopt(config, journal)
            _prepare_to_continue(config, journal, settle)
            closer = _Closer(config, recording)
            try:
                if journal.unfinished() or len(journal.trials) < settings * config.repeats:
                    run_trials(
                        config,
                        space,
                        settings,
                        num_samples,
                        journal,
                        recording.run_id,
                        lambda name: _ended(config, journal, settings, name, closer),
                    )
            finally:
                closer.close_all(journal)
            summary = _summarize(config, journal, space, recording)
            if config.refit and not summary["failed"]:
                summary["refit_checkpoint"] = _refit(config, summary, recording.run_id)
            summary["run_id"] = recording.run_id
            summary["seconds"] = round(time.monotonic() - started, 1)
            storage.write_json(storage.join(config.output, RESULT), summary)
            if summary["failed"]:
                raise STGTError(
                    f"{summary['failed']} of {summary['trials']} trials failed; see the table "
                    f"above and {summary['report']}; the best other trial is "
                    f"{summary['best_trial']} with {config.metric} {summary['best_metric']:.1f}; "
                    "run the same command again to retry the failed trials"
                )
        recording.finish()
    return summary


def _with_shared_vocabulary(config: SweepConfig) -> SweepConfig:
    """Return the config with a vocabulary that trials on all nodes can read.

    Trials of earlier versions recorded the file that they were given, and resume with it.
    """
    is_shared = storage.exists(storage.join(config.output, VOCAB))
    if Journal(config.output).trials and not is_shared:
        return config
    vocab = share_vocabulary(config.train.vocab, config.output)
    return replace(config, train=replace(config.train, vocab=vocab))


def _check(config: SweepConfig, space: Mapping[str, Parameter]) -> preflight.TrainingData:
    """Check the settings and the data of all trials; return the data."""
    train = preflight.with_architecture(preflight.with_absolute_paths(config.train))
    if not train.validates:
        raise SettingError(
            "a sweep compares trials on validation clips; set --val-store or --hold-out"
        )
    _check_metric(config)
    of_data = check_values(space, train)
    data = preflight.check_data(train)
    for one in of_data:
        preflight.check_data(one)
    return data


def _check_metric(config: SweepConfig) -> None:
    from stgt.retrieval.metrics import by_name, is_better

    split = config.train.validation_split
    if config.train.questions is not None:
        known = [f"{split}/{name}" for name in preflight.selectable_metrics(config.train)]
    else:
        measured = by_name("t2v", [0.0, 0.0, 0.0], 0.0, 0.0)
        known = [f"{split}/{name}" for name in measured if is_better(name, 1.0)]
    if config.metric not in known:
        raise SettingError(
            f"metric = {config.metric!r} is not measured by the validation, or is better when it "
            f"is lower; choose one of {', '.join(known)}"
        )


def _check_resources(config: SweepConfig) -> None:
    from pipelines.common.cluster import require_bundle, require_resources
    from pipelines.train.reserved import bundles

    train = config.train
    feed = f", {train.feed_cpus} for its data workers" if train.feed_cpus else ""
    needed = {
        "CPU": (
            float(train.num_cpus()),
            f"{train.num_workers} workers with {train.threads_per_worker} each{feed}",
        )
    }
    if train.use_gpu:
        needed["GPU"] = (float(train.num_workers), "one per worker")
    require_resources("a trial", needed, "lower num_workers or num_loaders, or turn off use_gpu")
    require_bundle("a training worker of a trial", bundles(train)[0], "lower threads_per_worker")


def _claim(config: SweepConfig, digest: str) -> None:
    """Write the sweep's config, or check that settings and data are unchanged."""
    uri = storage.join(config.output, CONFIG)
    found = storage.read_json(uri) if storage.exists(uri) else {}
    if found.get(JOB, "sweep") != "sweep":
        raise STGTError(
            f"{config.output} is a folder of the job {found[JOB]}; choose another --output"
        )
    record = config_record("sweep", config, data_digest=digest)
    # Earlier versions did not record the data.
    knows_data = not found or DATA_DIGEST in settings_of(found)

    def refuse(found: Mapping[str, Any], differing: list[str]) -> STGTError:
        before, now = earlier.translated(found), earlier.translated(record)
        recipes = [one.get("train.recipe") for one in (before, now)]
        if None not in recipes and recipes[0] != recipes[1]:
            what = f"of another recipe ({recipes[0] or 'none'} -> {recipes[1] or 'none'})"
        else:
            changes = [
                f"{name.removeprefix('train.')}: {before.get(name)!r} -> {now.get(name)!r}"
                for name in differing
            ]
            more = f"; and {len(changes) - NAMED} more" if len(changes) > NAMED else ""
            what = f"with different settings ({'; '.join(changes[:NAMED])}{more})"
        return STGTError(
            f"{config.output} contains a sweep {what}; choose another --output, or delete this "
            "folder"
        )

    operational = frozenset(marked_fields(SweepConfig, FieldMark.OPERATIONAL))
    claim_folder(
        config.output,
        CONFIG,
        record,
        refuse,
        compared=lambda one: {**earlier_values(SweepConfig), **earlier.translated(one)},
        ignored=lambda name: (
            (is_below(name, operational) and name != "train.val_clips")
            or (name == DATA_DIGEST and not knows_data)
            # More settings of the same search; a population has the size it began with.
            or (name == "trials" and config.search != "pbt")
            or name == "train.recipe"
            or name.startswith("train.tracking.")
        ),
    )


def _recording(config: SweepConfig, data: preflight.TrainingData, settings: int) -> Recording:
    return Recording(
        config.train.tracking,
        config.name,
        storage.join(config.output, RUN),
        to_dict(config),
        meanwhile=f"the sweep continues and its results are kept in {config.output}; they will "
        "be sent once MLflow can be used",
        about=About(
            job="sweep",
            summary=_describe(config, settings),
            recipe=config.train.recipe,
            datasets=datasets_of(preflight.with_absolute_paths(config.train), data),
            fingerprints={"data": data.digest},
            origin=None if config.train.init_from is None else origin_of(config.train.init_from),
        ),
    )


def _describe(config: SweepConfig, settings: int) -> str:
    """Return what the sweep does, for readers who do not know the project."""
    how = {
        "random": "drawn at random",
        "grid": "from a grid",
        "optuna": "chosen by Optuna's TPE",
        "pbt": "of a population that copies its best members",
    }[config.search]
    repeats = f", each with {config.repeats} seeds" if config.repeats > 1 else ""
    early = " ASHA stops trials that are behind." if config.uses_asha else ""
    recipe = f" of the recipe `{config.train.recipe}`" if config.train.recipe else ""
    searched = ", ".join(f"`{part}`" for part in config.space)
    return (
        f"Searches the settings{recipe} that give the highest `{config.metric}`: {settings} "
        f"settings {how}{repeats}. Searched: {searched}.{early} The trials are child runs of this "
        f"run, and `{PAGE}` among its files compares them. Everything is in `{config.output}`."
    )


def _prepare_to_continue(
    config: SweepConfig, journal: Journal, settle: Callable[[Journal, str, str], bool]
) -> None:
    """Record trials that ended while nobody watched, and retry those that failed."""
    from pipelines.sweep.trial import forget_fault, read_fault

    failed = [name for name, end in journal.ends.items() if end.status == "failed"]
    for name in failed:
        journal.retry(name)
        forget_fault(journal.folder(name))
    for trial in journal.unfinished():
        fault = read_fault(journal.folder(trial.name))
        if fault is not None and not fault["diverged"]:
            forget_fault(journal.folder(trial.name))
        elif fault is not None and config.search == "pbt":
            continue  # the population replaces it
        settle(journal, trial.name, config.metric)
        if trial.name not in journal.ends:
            _end_if_refused(config, journal, trial)
    if journal.trials:
        logger.info(
            "%s continues: %d trials have ended, %d continue%s",
            config.name,
            len(journal.ends),
            len(journal.unfinished()),
            f" ({len(failed)} of them failed before)" if failed else "",
        )


def _end_if_refused(config: SweepConfig, journal: Journal, trial: Trial) -> None:
    """Record a trial whose setting the config refuses, which would fail whenever it is started."""
    from pipelines.sweep.trial import trial_config

    try:
        trial_config(config, trial.name, trial.seed, trial.values)
    except SettingError as error:
        journal.end(trial.name, "failed", 0, None, str(error))


def _ended(
    config: SweepConfig, journal: Journal, settings: int, name: str, closer: _Closer
) -> None:
    """Log the end of a trial and the best so far."""
    end = journal.ends[name]
    best = best_setting(journal.outcomes())
    so_far = ""
    if best is not None and best.mean is not None and best.best_trial is not None:
        so_far = f"; best so far {best.best_trial.name} with {config.metric} {best.mean:.1f}"
    logger.info(
        "%s %s%s; %d of %d trials have ended%s",
        name,
        end.status,
        f" ({end.reason})" if end.reason else "",
        len(journal.ends),
        settings * config.repeats,
        so_far,
    )
    if end.status == "stopped":
        closer.close_later(name, end.reason)


class _Closer:
    """Closes the MLflow runs of trials that could not do it themselves."""

    def __init__(self, config: SweepConfig, recording: Recording) -> None:
        self._config, self._recording = config, recording
        self._timers: list[threading.Timer] = []

    def close_later(self, name: str, reason: str) -> None:
        """Close the run of a trial that was stopped, once its training has ended."""
        timer = threading.Timer(CLOSE_AFTER_S, self._close, [name, f"stopped early: {reason}"])
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def close_all(self, journal: Journal) -> None:
        """Close the runs of all trials that have ended or were interrupted.

        Runs of trials that began before the parent run could be opened get their parent here.
        """
        for timer in self._timers:
            timer.cancel()
            timer.join()
        for name, trial in sorted(journal.trials.items()):
            end = journal.ends.get(name)
            if end is not None and end.status == "stopped":
                self._close(name, f"stopped early: {end.reason}")
            else:
                self._close(name, None, trial.rounds)

    def _close(
        self, name: str, reason: str | None, changes: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        folder = storage.join(self._config.output, TRIALS, name)
        record = storage.join(folder, RUN)

        def close(parent: tracking.Run) -> None:
            found = storage.read_json(record)
            if without_credentials(found["tracking_uri"]) != parent.tracking_uri:
                return
            run = tracking.Run(parent.tracking_uri, found["run_id"])
            # Steps up to the last checkpoint of a trial that had no time to send them.
            every_s = self._config.train.tracking.send_every_s
            done = run_folder.latest(folder) or 0
            MetricsSender(folder, self._recording, every_s, done).send_to(run)
            if reason is None:
                run.close_if_running("the sweep was interrupted during this trial")
            else:
                run.finish("KILLED", reason)
            run.set_parent(parent.run_id)
            if changes:
                run.log_json("perturbations.json", {"changes": list(changes)})

        if storage.exists(record):
            self._recording.attempt(close)


def _summarize(
    config: SweepConfig,
    journal: Journal,
    space: Mapping[str, Parameter],
    recording: Recording,
) -> SweepSummary:
    """Log and write the report of a sweep, and send it to MLflow.

    Raises:
        STGTError: No trial measured the metric.
    """
    outcomes = journal.outcomes()
    logger.info("%s\n%s", config.name, report.settings_table(outcomes, config.metric))
    found = best_setting(outcomes)
    best = None if found is None or found.mean is None else found.best_trial
    curves = {name: journal.reports(name, config.metric) for name in journal.trials}
    page = storage.join(config.output, PAGE)
    content = report.render_page(
        outcomes,
        _distributions(space),
        config.metric,
        title=config.name,
        curves=curves,
        command=None if best is None else reproduce(config, best.name),
    ).encode()
    storage.write_bytes(page, content)
    if found is None or found.mean is None or best is None:
        recording.deliver(lambda run: run.log_file(PAGE, content), "files")
        first = next((one.reason for one in outcomes if one.reason), "no trial was validated")
        raise STGTError(
            f"no trial of {config.name} measured {config.metric}; the first reason was: {first}"
        )
    shares = report.importance(outcomes, _distributions(space), curves)
    if isinstance(shares, str):
        logger.info("%s", shares)
    else:
        told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
        logger.info("importance of the searched settings: %s", told)
    command = reproduce(config, best.name)
    if config.search == "pbt":
        logger.info("the last values of the best member, trained from the start with: %s", command)
    else:
        logger.info("the best setting again: %s", command)
    recording.deliver(lambda run: _record(run, config, outcomes, found, content))
    count = {
        status: sum(one.status == status for one in outcomes)
        for status in ("failed", "diverged", "stopped")
    }
    return SweepSummary(
        trials=len(outcomes),
        failed=count["failed"],
        diverged=count["diverged"],
        stopped_early=count["stopped"],
        best_trial=best.name,
        best_params=dict(found.values),
        best_metric=found.mean,
        best_spread=found.deviation,
        command=command,
        report=page,
        refit_checkpoint=None,
        run_id=None,
        seconds=0.0,
    )


def _distributions(space: Mapping[str, Parameter]) -> dict[str, Any]:
    return {name: one.distribution() for name, one in space.items()}


def _record(
    run: tracking.Run,
    config: SweepConfig,
    outcomes: list[TrialOutcome],
    best: SettingResult,
    page: bytes,
) -> None:
    """Send the result of a sweep to its MLflow run."""
    assert best.mean is not None
    assert best.best_trial is not None
    metrics = {f"best/{config.metric}": best.mean}
    if best.deviation is not None:
        metrics[f"best/{config.metric}_deviation"] = best.deviation
    for status in ("finished", "stopped", "diverged", "failed"):
        metrics[f"trials/{status}"] = float(sum(one.status == status for one in outcomes))
    run.log_metrics(metrics)
    run.log_file(PAGE, page)
    link = _link(config, run, best.best_trial.name)
    run.describe(
        f"{_describe(config, len({one.setting for one in outcomes}))}\n\n"
        f"The best trial is {link} with `{config.metric}` {best.mean:.2f}: "
        f"{in_words(best.values)}. Train it again with `{reproduce(config, best.best_trial.name)}`."
    )
    run.log_json("best.json", {"trial": best.best_trial.name, "values": dict(best.values)})
    run.log_json("trials.json", {"trials": [vars(one) for one in outcomes]})


def _link(config: SweepConfig, parent: tracking.Run, name: str) -> str:
    """Return the name of a trial in Markdown, as a link to its run if it has one."""
    record = storage.join(config.output, TRIALS, name, RUN)
    run_id = tracking.recorded_run_id(record)
    return name if run_id is None else f"[{name}]({parent.link_to(run_id)})"


def _refit(config: SweepConfig, summary: SweepSummary, parent_id: str | None) -> str:
    """Train the best setting on training and validation clips; return its last checkpoint."""
    from pipelines.sweep.trial import trial_config
    from pipelines.train.run import run_train

    best = trial_config(config, summary["best_trial"], config.train.seed, summary["best_params"])
    logger.info("refit: %s, on the validation clips as well", in_words(summary["best_params"]))
    return run_train(refit_config(config, best), parent_id=parent_id, estimate=False)["checkpoint"]
