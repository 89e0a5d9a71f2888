"""Convert released weights to a model folder, or create a model with pre-trained parts."""

from jobs.entry import Job, main
from jobs.settings import CommandLine
from pipelines.export.weights.config import ImportConfig

JOB = Job(
    name="import_weights",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(ImportConfig, __doc__ or ""),
    target="pipelines.export.weights.run:run_import",
)

if __name__ == "__main__":
    main(JOB)
