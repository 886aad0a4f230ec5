{
  description = "In the place of sops-nix, for tests: see ../README.md";

  inputs.nixpkgs.url = "path:../nixpkgs";

  outputs = _: {
    # what sops-nix makes of its options for sops-install-secrets, by the names that it has there
    nixosModules.sops =
      {
        config,
        lib,
        pkgs,
        ...
      }:
      {
        sops.package = lib.mkDefault (
          pkgs.runCommand "sops-install-secrets" { } ''
            mkdir -p $out/bin
            echo '#!/bin/sh' >$out/bin/sops-install-secrets
          ''
        );
        system.build.sops-nix-manifest = pkgs.writeText "manifest.json" (
          builtins.toJSON {
            secrets = lib.mapAttrsToList (name: secret: {
              inherit name;
              inherit (secret) owner group mode;
              key = name;
              path = "/run/secrets/${name}";
              sopsFile = config.sops.defaultSopsFile;
              format = "yaml";
            }) config.sops.secrets;
            secretsMountPoint = "/run/secrets.d";
            symlinkPath = "/run/secrets";
            inherit (config.sops) keepGenerations useTmpfs;
            ageKeyFile = config.sops.age.keyFile;
          }
        );
      };
  };
}
