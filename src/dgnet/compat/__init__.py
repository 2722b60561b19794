"""Every use of a private name of another library, a file for each library.

An upgrade may move such a name: each has a test that says so. No other file of the package touches one.
"""
