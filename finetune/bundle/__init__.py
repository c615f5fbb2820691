"""What a site without a network needs, as one folder or tar file: `pack.pack(recipe, out)`, checked by `verify.verify`.

Nothing is imported here: `verify` runs where no other package is installed yet.
"""
