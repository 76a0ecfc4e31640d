"""The demo, ``python -m aiosync``: it counts the most frequent words in a tree of text files.

Read `_workers` first. It is the part that uses aiosync: a program such as a user might write. The
other modules find the files and draw what the workers do.

_errors     what the user can put right
_text       bytes as text
_files      which files to count
_options    the command line
_database   where the counts are added up, and the pool of connections to it
_workers    tasks and threads that share a semaphore, a barrier and the pool
_history    what each worker did and when, as told by `aiosync._observed`
_terminal   what the terminal can do
_timeline   the history as lines of text
_frame      the present as lines of text
_live       redraws a frame while the workers run
_summary    the figures of a run
_run        one run of the demo
"""
