"""Every command of the READMEs works as it stands, on small stand-ins for the named files.

Jobs that need Ray do all of their checks and are stopped where they would connect to it; one
training runs completely in the soak tier. Jobs that do not need Ray run completely. Of the jobs
that need files of gigabytes, only the command line is read: other tests import and export weights.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import BertTokenizerFast

from jobs.command_line import read_command_line
from jobs.entry import Job
from jobs.submit import split_arguments
from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import CLIP_SCHEMA, shard_uri, shard_writer
from pipelines.evaluate.benchmarks import BENCHMARKS
from pipelines.submit.locations import refuse_relative
from pipelines.video import frame_codec
from pipelines.video.config import SamplingConfig
from stgt import STGT, stgt_tiny
from stgt.config import ModelConfig, stgt_g
from stgt.inputs.tokenizer import Tokenizer
from tests.helpers.archives import write_tar
from tests.helpers.data import PROJECT, TinyData

pytestmark = pytest.mark.ray

READMES = [PROJECT / "README.md", *sorted((PROJECT / "pipelines").rglob("README.md"))]
COMMAND = re.compile(r"^python -m jobs\.(\w+)((?:\\\n|[^\n])*)$", re.MULTILINE)
ONLY_READ = ("import_weights", "export_weights", "bench", "quickstart", "estimate")
PAIRS = 12
COMPARED = ("eval/zero-shot", "eval/tuned")


class ConnectedError(Exception):
    """A job would connect to Ray now."""


def commands(readme: Path) -> list[tuple[str, list[str]]]:
    """Return job and arguments of the commands in the code blocks of a README."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [
        (job, shlex.split(words.replace("\\\n", " "), comments=True))
        for block in blocks
        for job, words in COMMAND.findall(block)
    ]


ALL = [
    pytest.param(job, words, id=f"{readme.parent.name}-{number}-{job}")
    for readme in READMES
    for number, (job, words) in enumerate(commands(readme))
]


DATASETS = PROJECT / "pipelines/manifest/DATASETS.md"
PARSED = [*sorted((PROJECT / "stgt").rglob("README.md")), DATASETS, *READMES]
"""READMEs whose other commands are read: those of models, and those in running text with a file."""
INLINE = re.compile(r"`python -m jobs\.(\w+) ([^`]*--output[^`]*)`")


def other_commands(readme: Path) -> list[tuple[str, list[str]]]:
    """Return job and arguments of the commands that are not run: they name files of others."""
    in_text = INLINE.findall(readme.read_text())
    found = [(job, shlex.split(words)) for job, words in in_text]
    return found + (commands(readme) if readme not in READMES else [])


OTHERS = [
    pytest.param(job, words, id=f"{readme.parent.name}-{number}-{job}")
    for readme in PARSED
    for number, (job, words) in enumerate(other_commands(readme))
]


@pytest.fixture(scope="module")
def folder(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands name."""
    place = tmp_path_factory.mktemp("readme")
    videos = sorted(Path(tiny_data.videos).rglob("*.mp4"))[:PAIRS]
    _annotated_videos(place, videos)
    for name in ("clips/0a1b", "test-clips/2c3d"):
        shutil.copytree(tiny_data.train_store, place / name)
    for name in ("test.parquet", "captioned.parquet"):
        shutil.copy(tiny_data.train_manifest, place / name)
    published = SamplingConfig(num_frames=16, size=224, decoder="auto")
    _store(place / "clips/msrvtt/6a7b", published, PAIRS)
    _store(place / "clips/msrvtt-9k/8c9d", published, clips=520)
    tiny_frames = SamplingConfig(num_frames=12, size=64)
    _store(place / "quickstart-output/clips/train/4e5f", tiny_frames, clips=100)
    (place / "quickstart-output/clips/train/done.json").write_text("{}")
    shutil.copy(tiny_data.vocab, place / "quickstart-output/vocab.txt")
    tokenizer = Tokenizer(tiny_data.vocab)
    full = stgt_g().for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id)
    tiny = stgt_tiny().for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id)
    for name in ("models/stgt", "runs/msrvtt/checkpoints/step-00000100"):
        _full_size_checkpoint(place / name, full, tokenizer)
    trained = STGT(tiny)
    for name in ("runs/first", "quickstart-output/stage1"):
        uri = str(place / name / "checkpoints/step-00000120")
        checkpoints.save(uri, trained, tokenizer, step=120)
    (place / "my.yaml").write_text(
        "recipe: pretrain_stage1_tiny\ndata: [clips/]\noutput: runs/mine\n"
    )
    _embeddings(place)
    return place


def _embeddings(place: Path) -> None:
    """Write embeddings of another model for the clips of the READMEs, in both forms."""
    ids = [f"video{number}" for number in range(PAIRS)]
    vectors = np.eye(PAIRS, 8, dtype=np.float32) + 0.1
    np.savez(
        place / "theirs.npz",
        video_ids=np.array(ids),
        video_embeds=vectors,
        caption_video_ids=np.array(ids),
        caption_embeds=vectors,
    )
    rows = [
        {"kind": kind, "video_id": one, "embedding": vector.tolist()}
        for kind in ("video", "caption")
        for one, vector in zip(ids, vectors, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), place / "theirs.parquet")


def _annotated_videos(place: Path, videos: list[Path]) -> None:
    """Write videos with annotations like WebVid's and MSR-VTT's 1k-A split, and without any."""
    for name in ("videos/000", "videos/all"):
        (place / name).mkdir(parents=True)
    urls = "\n".join(f"https://example.org/{number}.mp4" for number in range(PAIRS))
    (place / "urls.txt").write_text(urls)
    (place / "links.csv").write_text("link,text\nhttps://example.org/1.mp4,a circle\n")
    for name in ("footage", "shards"):
        (place / name).mkdir()
    shutil.copy(videos[0], place / "footage/a.mp4")
    write_tar(place / "shards/00000.tar", {"a.mp4": videos[0].read_bytes(), "a.txt": "a circle"})
    own = [["videoid", "page_dir", "name"]]
    msrvtt = [["key", "vid_key", "video_id", "sentence"]]
    for number, video in enumerate(videos):
        shutil.copy(video, place / f"videos/000/{number}.mp4")
        shutil.copy(video, place / f"videos/all/video{number}.mp4")
        own.append([str(number), "000", f"a red circle, number {number}"])
        msrvtt.append([f"ret{number}", f"msr{number}", f"video{number}", f"a circle {number}"])
    for name, rows in (("results.csv", own), ("MSRVTT_JSFUSION_test.csv", msrvtt)):
        with (place / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def _full_size_checkpoint(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Write a checkpoint of the published size, in which the weights are an empty sparse file."""
    folder.mkdir(parents=True)
    tokenizer.save(folder / "vocab.txt")
    (folder / "config.json").write_text(json.dumps({"model": config.to_dict()}))
    (folder / "state.json").write_text(json.dumps({"step": 0, "vocabulary": None}))
    for name in ("model.safetensors", "frame_encoder.safetensors"):
        with (folder / name).open("wb") as file:
            file.truncate(4 * 10**9)
    (folder / "COMPLETE").touch()


def _store(folder: Path, sampling: SamplingConfig, clips: int) -> None:
    """Write a finished store of black clips with 20 captions each."""
    shape = (sampling.num_frames, sampling.size, sampling.size, 3)
    frames = frame_codec.encode_frames(np.zeros(shape, np.uint8), "jpeg", 95)
    rows: list[dict[str, Any]] = [
        {
            **dict.fromkeys(CLIP_SCHEMA.names),
            "clip_id": f"video{number}",
            "video_id": f"video{number}",
            "video_uri": f"/videos/video{number}.mp4",
            "captions": [f"caption {caption} of {number}" for caption in range(20)],
            "frames": frames,
        }
        for number in range(clips)
    ]
    Path(shard_uri(str(folder), 0)).parent.mkdir(parents=True)
    with shard_writer(shard_uri(str(folder), 0)) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=CLIP_SCHEMA))
    shard = {"shard": 0, "clips": len(rows), "sha256": "0", "bytes": 1, "quarantined": 0}
    catalogue = {
        "clips": len(rows),
        "quarantined": 0,
        "sampling": asdict(sampling),
        "shards": [shard],
        "digest": "0",
        "histograms": {"captions_per_clip": [len(rows)]},
    }
    (folder / "catalogue.json").write_text(json.dumps(catalogue))


@pytest.fixture
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as the working directory, with a vocabulary in place of the one on the Hub."""
    monkeypatch.chdir(folder)
    vocab = str(folder / "quickstart-output/vocab.txt")
    monkeypatch.setattr(
        BertTokenizerFast,
        "from_pretrained",
        lambda name: BertTokenizerFast(vocab=vocab, do_lower_case=True),
    )
    split = replace(BENCHMARKS["msrvtt"], videos=PAIRS, captions=PAIRS, ids_digest=None)
    monkeypatch.setitem(BENCHMARKS, "msrvtt", split)
    return folder


def test_there_are_commands_in_the_readmes() -> None:
    assert len(ALL) >= 20


@pytest.mark.parametrize(("name", "words"), ALL)
def test_a_command_works_as_it_stands(there: Path, name: str, words: list[str]) -> None:
    job: Job = import_module(f"jobs.{name}").JOB
    if name == "submit":
        own, (submitted, *arguments) = split_arguments(words)
        read_command_line(name, job.command_line, own)
        line = import_module(f"jobs.{submitted}").JOB.command_line
        refuse_relative(read_command_line(submitted, line, arguments)[0])
        return
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            read_command_line(job.name, job.command_line, words)
        return
    config, _ = read_command_line(job.name, job.command_line, words)
    if name in ONLY_READ:
        return

    def connect(config: Any) -> None:
        raise ConnectedError

    run = job.load_target()
    settings: dict[str, Any] = {} if job.cluster is None else {"connect": connect}
    if name == "train":
        settings["estimate"] = False  # it takes seconds and is of the size of the model
    if name == "compare":
        for place in COMPARED:
            shutil.rmtree(there / place, ignore_errors=True)
            shutil.copytree(there / "runs/first/eval", there / place)
    if name == "caption":
        (there / config.output).unlink(missing_ok=True)
    without = job.cluster is None or name == "caption"  # of few clips, by a small model
    without = without or (name == "manifest" and "--cut" not in words)
    runs_without_ray = without or {"any", "--embedding-file"} & set(words)
    if runs_without_ray:
        run(config, **settings)
    else:
        with pytest.raises(ConnectedError):
            run(config, **settings)
    if name == "compare":
        for place in COMPARED:
            shutil.rmtree(there / place)


@pytest.mark.parametrize(("name", "words"), OTHERS)
def test_other_commands_are_understood(name: str, words: list[str]) -> None:
    job: Job = import_module(f"jobs.{name}").JOB
    read_command_line(job.name, job.command_line, words)


@pytest.mark.soak
@pytest.mark.slow
def test_the_training_on_the_output_of_a_quickstart_runs_to_its_end(there: Path) -> None:
    (words,) = [
        words
        for name, words in commands(PROJECT / "pipelines" / "train" / "README.md")
        if name == "train" and words[0] == "finetune_msrvtt_tiny"
    ]
    command = [sys.executable, "-m", "jobs.train", *words]
    done = subprocess.run(
        command, cwd=there, env={**os.environ, "PYTHONPATH": str(PROJECT)}, check=False
    )
    assert done.returncode == 0
