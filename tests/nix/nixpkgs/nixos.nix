# What the rendered flake takes of a NixOS: a system that depends on all that was configured, and images
# that are small files. And of what NixOS itself says, that which others may not say as they like.
{ modules }:
let
  lib = import ./lib.nix;
  pkgs = import ./pkgs.nix;
  base =
    { config, ... }:
    {
      system.boot.loader.kernelFile = "bzImage";
      system.boot.loader.initrdFile = "initrd";
      system.build = {
        toplevel = pkgs.runCommand "nixos-system" {
          configuration = builtins.toJSON (config // { system = null; });
          passAsFile = [ "configuration" ];
        } "mkdir $out; cp $configurationPath $out/configuration.json; echo '#!/bin/sh' >$out/init";
        kernel = pkgs.runCommand "linux" { } "mkdir $out; echo kernel >$out/bzImage";
        initialRamdisk = pkgs.runCommand "initrd" { } "mkdir $out; echo initrd >$out/initrd";
        images =
          lib.genAttrs
            [
              "amazon"
              "iso"
              "kubevirt"
              "qemu"
              "raw-efi"
              "virtualbox"
              "vmware"
            ]
            (
              format:
              pkgs.runCommand "image-${format}" { } ''
                mkdir -p $out/nix-support
                echo ${format} grub=${builtins.toJSON config.boot.loader.grub.enable} >$out/nixos.img
                echo file >$out/nix-support/hydra-build-products
              ''
              // {
                passthru = {
                  inherit config;
                  filePath = "nixos.img";
                };
              }
            );
      };
    };
  # what NixOS' own modules say of units that ours say more of, at the same priority as ours
  own = config: {
    systemd.services =
      (
        if config.services.journald.upload.enable or false then
          { systemd-journal-upload.serviceConfig.RestartSec = "3sec"; }
        else
          { }
      )
      // (
        if config.services.tempo.enable or false then
          { tempo.serviceConfig.ProtectSystem = "full"; }
        else
          { }
      )
      // (
        if config.services.prometheus.exporters.nginx.enable or false then
          { prometheus-nginx-exporter.requires = [ "nginx.service" ]; }
        else
          { }
      );
  };
  # folders that are one link into the store: the etc of NixOS is not built with a file below
  linked = "systemd/(system|user|system-generators|system-shutdown|user-generators)/.*";
  make =
    modules:
    let
      evaluate =
        modules:
        lib.evaluate {
          modules = modules ++ [ base ];
          specialArgs = { inherit pkgs; };
        };
      said = own (evaluate modules).config;
      made = evaluate (modules ++ (if said.systemd.services == { } then [ ] else [ said ]));
      below = builtins.filter (name: builtins.match linked name != null) (
        builtins.attrNames (made.config.environment.etc or { })
      );
    in
    {
      config =
        if below == [ ] then
          made.config
        else
          throw "environment.etc.\"${builtins.head below}\" lies below a link into the store";
      extendModules = more: make (modules ++ more.modules);
    };
in
make modules
