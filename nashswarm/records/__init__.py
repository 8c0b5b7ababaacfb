"""Records of finished runs, the only source of numbers, and how they are written.

``record`` defines a record, its fingerprint and its file.  ``files`` writes files atomically and keeps processes apart
by claims.  ``provenance`` describes the code, versions and machine of a record.  ``statistics`` has intervals, tests
and interpolation over windows of text.
"""
