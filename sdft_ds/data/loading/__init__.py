"""From files, folders, the hub or rows in memory to a data set with the columns that the trainer reads."""
