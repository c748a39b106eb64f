"""Where the stages meet: each public function here is one command of the command line.

The stages know nothing of each other; this package hands what one makes to the next.
"""
