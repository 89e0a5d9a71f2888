"""Joins the cluster of RAY_ADDRESS as a job does: `python -m tests.helpers.join_a_cluster`."""

from jobs.entry import run_job, start_ray


def join() -> dict[str, bool]:
    start_ray(cpus=1)
    return {"joined": True}


if __name__ == "__main__":
    run_job(join)
