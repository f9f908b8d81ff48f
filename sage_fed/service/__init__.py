"""The gRPC edge: protobuf in, protobuf out.

`edge` is the only way in (auth, parsing, errors to status); `requests` and `replies` translate;
`inference`, `budget`, `model` and `admin` are the four services; `health`, `reflection` and
`server` are what gRPC tools expect around them. `ports` says what the floors below must offer.
Protobuf stops in this package.
"""
