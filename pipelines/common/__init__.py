"""Code that every stage uses: storage, MLflow, progress, errors of Ray, output folders, pages.

The files take URIs and plain values and know nothing of clips or models. `storage` is the only
door to disk and S3, and `tracking` the only door to MLflow. Begin with `storage`.
"""
