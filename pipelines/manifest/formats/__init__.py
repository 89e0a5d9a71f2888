"""One reader per annotation format: files go in, clip rows and rejected rows come out."""
