"""Every use of a private name of another library, in one file for each library. No other file of the package uses one.

An upgrade of a library may change such a name. A test for each name then fails with a message that says so.
"""
