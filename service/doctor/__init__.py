"""`rnnserve doctor`: looks at this machine and at settings, and says what would not work, why, and what to do.

It has to work where nothing else does, so every package but those of the command line is imported when it is looked at.
"""
