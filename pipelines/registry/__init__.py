"""The register stage: turns a checkpoint into a version of a registered model in MLflow.

A version is an `mlflow.pyfunc` model made from code, with the parts of this project that it needs,
its weights or a reference to them, a signature and a model card. A version with the alias
`challenger` becomes `champion` if it is not worse on the same evaluation. Start reading at `run`.
"""
