"""Convert a model folder to a file in the authors' released format (.pth)."""

from jobs.entry import Job, main
from jobs.settings import CommandLine
from pipelines.export.weights.config import ExportConfig

JOB = Job(
    name="export_weights",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(ExportConfig, __doc__ or ""),
    target="pipelines.export.weights.export:run_export",
)

if __name__ == "__main__":
    main(JOB)
