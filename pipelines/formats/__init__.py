"""One reader a data set format: annotation file -> clip rows and rejected rows."""
