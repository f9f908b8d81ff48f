"""The gRPC edge: protobuf in, protobuf out.

`edge` is the only way in (auth, parsing, errors to status), `rules` says who may call what;
`requests`, `replies` and `reports` translate; `inference`, `budget`, `model` and `admin` are the
four services; `health`, `reflection` (over `standard`) and `server` are what gRPC tools expect
around them, `tls` is what they are shown. `ports` says what the floors below must offer.
Protobuf stops in this package.
"""
