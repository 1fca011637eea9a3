"""File to file: rows of any format, several tasks in one pass, in parts that are committed one by one."""
