"""Code shared by all stages: storage, MLflow, progress, Ray errors, output folders, HTML pages.

These modules take URIs and plain values and do not depend on clips or models. All access to disk
and S3 goes through `storage`, and all access to MLflow through `tracking`. Start with `storage`.
"""
