"""Files of rows with access by index: which files a path names, their bytes by ranges, and a reader per format."""
