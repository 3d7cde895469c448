"Files, random streams, child processes, provenance: what every wing stands on."
