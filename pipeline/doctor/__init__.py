"""What is installed, what this machine can run, and whether it runs it right: behind `marsinfer doctor`.

A probe finds out one thing. `examine` runs all of them in a process of their own, so that none can take the
caller down; each is a plain function in packages.py, machine.py, abilities.py or selftest.py.
"""
